"""A micro-batch's forward and backward pass as one CUDA graph, recorded once for every rounded shape.

On a small model a GPU waits for the program that starts its kernels: some 200 a layer. A graph starts them all at
once. Its shapes and addresses are fixed, so a micro-batch is laid into memory that stays, its sizes rounded up: the
tokens that fill it are a row of their own without labels, and labels that fill it are IGNORE and add nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.backend import IGNORE, Batch
from common.data.batching import LABEL_STEPS, TOKEN_STEPS, rounded
from torch_backend.attention import Rows
from torch_backend.loss import PackedBatch

_KEPT = 64  # graphs at the most; the one used longest ago goes


def sizes(batch: Batch, width: int = 0) -> tuple[int, int, int, int]:
    """Of the graph for `batch`: `(tokens, labels, rows, tokens of the longest row)`, the last no less than `width`.

    Few on varied rows. Rows that are not there cost attention's backward pass some of the processors, a width nothing.
    """
    tokens = rounded(batch.tokens, *TOKEN_STEPS)
    widest = max(int(batch.lengths.max()), tokens - batch.tokens, width)
    return tokens, rounded(batch.label_tokens, *LABEL_STEPS), rounded(len(batch.lengths), 8, 1), rounded(widest, 512, 1)


def filled(batch: Batch, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Everything that a graph of `shape` reads, in one array of int64: one copy to the device."""
    tokens, labels, rows, _ = shape
    real = np.arange(batch.labels.shape[1]) < batch.lengths[:, None]
    right = batch.labels[real]
    chosen = (right != IGNORE).nonzero()[0]
    rest = np.arange(tokens - batch.tokens)
    ends = np.cumsum(batch.lengths)
    return np.concatenate(
        [
            batch.input_ids[real],
            np.zeros_like(rest),
            real.nonzero()[1],
            rest,
            chosen,
            np.zeros(labels - len(chosen), np.int64),
            right[chosen],
            np.full(labels - len(chosen), IGNORE),
            [0],
            ends,
            np.full(rows + 1 - len(ends), tokens),
        ]
    ).astype(np.int64)


def laid(memory: torch.Tensor, shape: tuple[int, int, int, int]) -> PackedBatch:
    """`filled`'s array as what the model reads."""
    tokens, labels, rows, width = shape
    ids, positions, chosen, right, bounds = memory.split([tokens, tokens, labels, labels, rows + 2])
    return PackedBatch(ids, positions, chosen, right, Rows(rows + 1, width, None, bounds.to(torch.int32)))


class Graphs:
    """`run(batch)`: what `step(laid)` does, which may allocate but must not wait for the device."""

    def __init__(self, step: Callable[[PackedBatch], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.graphs: dict[tuple[int, int, int, int], tuple[torch.Tensor, Any]] = {}
        self.pool: Any = None
        self.width = 0  # of the widest so far: graphs of another width would be the same again

    def run(self, batch: Batch) -> None:
        shape = sizes(batch, self.width)
        self.width = shape[3]
        array = torch.from_numpy(filled(batch, shape)).pin_memory()
        if self.pool is None:  # the first, so that libraries have made what they need: no graph may
            self.step(laid(array.to(self.device, non_blocking=True), shape))
            self.pool = torch.cuda.graph_pool_handle()
            return
        if shape not in self.graphs and len(self.graphs) == _KEPT:
            del self.graphs[next(iter(self.graphs))]
        memory, graph = self.graphs.pop(shape) if shape in self.graphs else self._record(shape, len(array))
        self.graphs[shape] = memory, graph  # as the newest
        memory.copy_(array, non_blocking=True)
        graph.replay()

    def _record(self, shape: tuple[int, int, int, int], length: int) -> tuple[torch.Tensor, Any]:
        memory, graph = torch.zeros(length, dtype=torch.int64, device=self.device), torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),  # a broken record would stay on its own
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                try:
                    self.step(laid(memory, shape))
                except RuntimeError as error:  # out of memory, say, which the end of a broken record would hide
                    failure = error
                    raise
        except RuntimeError as error:
            raise (failure or error) from None
        return memory, graph


def can_graph(model: Any, method: str, dropout: float, quantization: str) -> bool:
    """Whether nothing in a step waits for the device or draws random numbers, and no length changes the rotation."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    plain = method == "lora" and not dropout and quantization in ("none", "nf4")
    return plain and not kinds & {"longrope", "dynamic"}

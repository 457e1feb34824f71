"""A micro-batch's forward and backward pass as one CUDA graph, recorded once for every rounded shape.

On a small model a GPU waits for the program that starts its kernels: some 200 a layer. A graph starts them all at
once. Its shapes and addresses are fixed, so a micro-batch is copied into memory that stays, its sizes rounded up. The
tokens that are added are a row of their own without labels; labels that are added weigh 0, and change no loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.backend import Batch
from common.data.batching import LABEL_STEPS, TOKEN_STEPS, rounded
from torch_backend.attention import RaggedRows
from torch_backend.loss import PackedBatch

_KEPT = 64  # graphs at the most; the least recently used one is dropped


@dataclass(frozen=True)
class Layout:
    """The rounded sizes of a micro-batch, and how the arrays that its graph reads share one array of int64."""

    tokens: int
    labels: int
    rows: int
    width: int  # tokens of the longest row

    @staticmethod
    def of(batch: Batch, width: int = 0) -> "Layout":
        """The layout for `batch`, its width no less than `width`; batches of varied rows have few different ones.

        Rows that are added cost attention's backward pass some of the processors; a larger width costs nothing.
        """
        tokens = rounded(batch.tokens, *TOKEN_STEPS)
        widest = max(int(batch.lengths.max()), tokens - batch.tokens, width)
        labels, rows = rounded(batch.label_tokens, *LABEL_STEPS), rounded(len(batch.lengths), 8, 1)
        return Layout(tokens, labels, rows, rounded(widest, 512, 1))

    def sizes(self) -> tuple[int, ...]:
        """Of `PackedBatch`'s arrays, in order; the last is cu_seqlens, with a row for the added tokens."""
        return self.tokens, self.tokens, self.labels, self.labels, self.labels, self.rows + 2

    def pack(self, batch: Batch) -> np.ndarray:
        """Everything that the graph reads, in one array: one copy to the device. A weight is kept as its 32 bits."""
        real = np.arange(batch.targets.shape[1]) < batch.lengths[:, None]
        loss_weights = batch.loss_weights[real]
        labeled = loss_weights.nonzero()[0]
        added, ends = self.tokens - batch.tokens, np.cumsum(batch.lengths)
        parts = (
            _padded(batch.input_ids[real], self.tokens, 0),
            np.concatenate([real.nonzero()[1], np.arange(added)]),
            _padded(labeled, self.labels, 0),
            _padded(batch.targets[real][labeled], self.labels, 0),
            _padded(loss_weights[labeled].view(np.int32), self.labels, 0),
            _padded(np.concatenate([[0], ends]), self.rows + 2, self.tokens),
        )
        return np.concatenate(parts).astype(np.int64)

    def unpack(self, memory: torch.Tensor) -> PackedBatch:
        """Views of `memory`, which holds `pack`'s array; weights and cu_seqlens are converted."""
        ids, positions, label_positions, targets, bits, cu_seqlens = memory.split(self.sizes())
        loss_weights = bits.to(torch.int32).view(torch.float32)
        rows = RaggedRows(self.rows + 1, self.width, None, cu_seqlens.to(torch.int32))
        return PackedBatch(ids, positions, label_positions, targets, loss_weights, rows)


def _padded(array: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(size - len(array), value)])


class Graphs:
    """`run(batch)`: what `step(packed)` does, which may allocate but must not wait for the device."""

    def __init__(self, step: Callable[[PackedBatch], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.graphs: dict[Layout, tuple[torch.Tensor, Any]] = {}
        self.pool: Any = None
        self.width = 0  # of the widest so far: a graph of another width would be recorded for nothing

    def run(self, batch: Batch) -> None:
        layout = Layout.of(batch, self.width)
        self.width = layout.width
        array = torch.from_numpy(layout.pack(batch)).pin_memory()
        if self.pool is None:  # the first goes without a graph: libraries set up what they need, which no graph may do
            self.step(layout.unpack(array.to(self.device, non_blocking=True)))
            self.pool = torch.cuda.graph_pool_handle()
            return
        if layout not in self.graphs and len(self.graphs) == _KEPT:
            del self.graphs[next(iter(self.graphs))]
        memory, graph = self.graphs.pop(layout) if layout in self.graphs else self._record(layout)
        self.graphs[layout] = memory, graph  # as the newest
        memory.copy_(array, non_blocking=True)
        graph.replay()

    def _record(self, layout: Layout) -> tuple[torch.Tensor, Any]:
        """`(the memory that the graph reads, the graph)`."""
        memory = torch.zeros(sum(layout.sizes()), dtype=torch.int64, device=self.device)
        graph = torch.cuda.CUDAGraph()
        failure: Exception | None = None
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),  # a failed capture would leave its own set
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                try:
                    self.step(layout.unpack(memory))
                except RuntimeError as error:  # such as out of memory, which the end of a failed capture would hide
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

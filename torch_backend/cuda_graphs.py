"""A micro-batch's forward and backward pass as one CUDA graph, recorded once for each of at most eight sizes.

On a small model a GPU waits for the program that starts its kernels: some 200 a layer. A graph starts them all at
once. Its shapes and addresses are fixed, so a micro-batch is copied into memory that stays, its sizes rounded up. The
tokens that are added are a row of their own without labels; labels that are added weigh 0, and change no loss.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from common.backend import Batch
from common.data.batching import LABEL_STEPS, TOKEN_STEPS, rounded
from common.memory_terms import MicroBatchShape
from torch_backend.attention import RaggedRows
from torch_backend.device_settings import empty_cache
from torch_backend.loss import PackedBatch

_MOST = 8  # layouts of a run
_RECORDING = 4000  # tokens trained while a graph is recorded: on an H200 10,000 of SmolLM2-135M, of larger models fewer
_COSTS = np.array([1.0, 0.5, 64.0])  # of one more token, label and row, in tokens
_KEPT = 64  # graphs of a run whose sizes are not known before; the least recently used one is dropped


@dataclass(frozen=True)
class Layout:
    """The rounded sizes of a micro-batch, and how the arrays that its graph reads share one array of int64."""

    tokens: int
    labels: int
    rows: int
    width: int  # tokens of the longest row, or of the row of added ones

    @staticmethod
    def of(own: MicroBatchShape, width: int = 0) -> "Layout":
        """Its sizes rounded up, the width no less than `width`; batches of varied rows have few different ones.

        Rows that are added cost attention's backward pass some of the processors; a larger width costs nothing.
        """
        tokens = rounded(own.tokens, *TOKEN_STEPS)
        labels, rows = rounded(own.labels, *LABEL_STEPS), rounded(own.rows, 8, 1)
        return Layout(tokens, labels, rows, rounded(max(own.width, tokens - own.tokens, width), 512, 1))

    def holds(self, own: MicroBatchShape) -> bool:
        fits = own.tokens <= self.tokens and own.labels <= self.labels and own.rows <= self.rows
        return fits and max(own.width, self.tokens - own.tokens) <= self.width

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


def choose_layouts(shapes: Counter[MicroBatchShape]) -> list[Layout]:
    """At most eight layouts that hold all of a run's micro-batches, those first that hold most; all have one width.

    shapes: how many micro-batches have which. Again and again the two layouts are joined whose padding then costs
    least: until there are few enough, and as long as it costs less than recording one more.
    """
    counts = Counter[Layout]()
    for own, count in shapes.items():
        counts[replace(Layout.of(own), width=0)] += count
    sizes = np.array([(layout.tokens, layout.labels, layout.rows) for layout in counts]).reshape(-1, 3)
    number = np.array([*counts.values()], float)
    while len(sizes) > 1:
        joined = np.maximum(sizes[:, None], sizes)  # [N, N, 3]
        more = number[:, None] * ((joined - sizes[:, None]) @ _COSTS)
        more += more.T
        np.fill_diagonal(more, np.inf)
        one, other = np.unravel_index(np.argmin(more), more.shape)
        if len(sizes) <= _MOST and more[one, other] > _RECORDING:
            break
        sizes[one], number[one] = joined[one, other], number[one] + number[other]
        sizes, number = np.delete(sizes, other, 0), np.delete(number, other)
    any_width = int(sizes[:, 0].max(initial=0))
    ordered = sizes[np.argsort(-number, kind="stable")].tolist()
    layouts = [Layout(tokens, labels, rows, any_width) for tokens, labels, rows in ordered]
    width = max((max(own.width, layout_for(own, layouts).tokens - own.tokens) for own in shapes), default=0)
    return [replace(layout, width=rounded(width, 512, 1)) for layout in layouts]


def layout_for(own: MicroBatchShape, layouts: Sequence[Layout], width: int = 0) -> Layout:
    """The layout that holds the micro-batch at the least cost; where none does, its own sizes rounded."""
    fitting = [layout for layout in layouts if layout.holds(own)]
    cost = {layout: float(_COSTS @ (layout.tokens, layout.labels, layout.rows)) for layout in fitting}
    return min(fitting, key=cost.__getitem__) if fitting else Layout.of(own, width)


class Graphs:
    """`run(batch)`: what `step(packed)` does, which may allocate but must not wait for the device.

    layouts: of the graphs, where they are known before; what fits none of them runs without a graph.
    """

    def __init__(self, step: Callable[[PackedBatch], None], device: torch.device) -> None:
        self.step, self.device = step, device
        self.layouts: Sequence[Layout] = ()
        self.drop()

    def expect(self, shapes: Counter[MicroBatchShape]) -> None:
        """shapes: of the micro-batches to come, and how many there are of each."""
        self.drop()
        self.layouts = choose_layouts(shapes)

    def drop(self) -> None:
        """Drop all graphs, and the memory that only they can use."""
        self.graphs: dict[Layout, tuple[torch.Tensor, Any]] = {}
        self.pool: Any = None
        self.width = 0  # of the widest so far: a graph of another width would be recorded for nothing
        empty_cache()

    def layout(self, batch: Batch) -> Layout:
        return layout_for(batch.shape, self.layouts, self.width)

    def run(self, batch: Batch) -> None:
        layout = self.layout(batch)
        self.width = layout.width
        array = torch.from_numpy(layout.pack(batch)).pin_memory()
        unexpected = bool(self.layouts) and layout not in self.layouts
        if unexpected or self.pool is None:  # the first lets libraries set up what they need, which no graph may do
            self.step(layout.unpack(array.to(self.device, non_blocking=True)))
            self.pool = self.pool or torch.cuda.graph_pool_handle()
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

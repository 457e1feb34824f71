"""The forward pass over rows of token ids: packed, through layers of ours, or by mlx-lm alone."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from common.backend import Batch
from common.data.batching import rounded, single_rows, split_batch
from common.data.layouts import fitted, layout_for, smallest_layout
from common.memory_terms import MicroBatchShape
from mlx_backend.attention import RaggedRows
from mlx_backend.linear_attention import LinearCache
from mlx_backend.loss import Inputs, inputs_of, log_sum_exp, loss_sum
from mlx_backend.model import head, hidden_states

# Ids that continue a row, and whether it is a new one -> the logits [vocabulary] after them.
Continue = Callable[[list[int], bool], mx.array]
_WIDTHS = (32, 4)  # of plain rows on a GPU, which compiles each: the smallest, and how many between powers of two


class Forward(Protocol):
    """How a model computes."""

    def inputs(self, batch: Batch, layouts: Sequence[MicroBatchShape]) -> list[Inputs]:
        """The parts of a micro-batch that are computed together, in these layouts; none of a part without a label."""
        ...

    def loss(self, inputs: Inputs, chunk: int) -> mx.array:
        """Weighted sum of the token losses, a float32 scalar. chunk: label positions whose logits are held at once."""
        ...

    def logits(self, ids: np.ndarray, positions: np.ndarray | None) -> mx.array:
        """[P, vocabulary] float32 at `positions` [P], or at all, of one row of ids [T]."""
        ...

    def continuing(self) -> Continue:
        """A function that keeps the keys, values and states of a row."""
        ...


class PackedForward:
    """Of a known architecture: rows are packed, and padded inside attention only. The model is load_base's."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.rounds = model, device == "gpu"  # which compiles each shape

    def inputs(self, batch: Batch, layouts: Sequence[MicroBatchShape]) -> list[Inputs]:
        parts = [
            part
            for rows in split_batch(batch, self.model.forward_config.rope_split)
            for part in fitted(rows, layouts)
            if part.label_tokens
        ]
        return [inputs_of(part, self._layout(part.shape, layouts)) for part in parts]

    def _layout(self, shape: MicroBatchShape, layouts: Sequence[MicroBatchShape]) -> MicroBatchShape:
        if layouts:
            return layout_for(shape, layouts)
        limit = self.model.forward_config.rope_split
        within = limit is not None and shape.width <= limit  # a wider layout would rotate by other frequencies
        return smallest_layout(shape, widest=limit if within else None) if self.rounds else shape

    def loss(self, inputs: Inputs, chunk: int) -> mx.array:
        return loss_sum(self.model, inputs, chunk)

    def logits(self, ids: np.ndarray, positions: np.ndarray | None) -> mx.array:
        inputs = mx.array(np.asarray(ids, np.int32))
        hidden = hidden_states(self.model, inputs, RaggedRows(1, len(inputs), None))
        return head(self.model, hidden if positions is None else hidden[mx.array(positions)])

    def continuing(self) -> Continue:
        from mlx_lm.models.cache import KVCache

        caches: list[Any] = []

        def forward(ids: list[int], restart: bool) -> mx.array:
            nonlocal caches
            if restart:
                # KVCache keeps every key; a mask cuts the windows
                caches = [KVCache() if "self_attn" in layer else LinearCache() for layer in self.model.layers]
            hidden = hidden_states(self.model, mx.array(ids), RaggedRows(1, len(ids), None), caches)
            return head(self.model, hidden[-1:])[0]

        return forward


class PlainForward:
    """Of any other: mlx-lm's layers, one row at a time, so that nothing is padded but the end of a row on a GPU.

    No token sees a later one, whatever the layers are (attention, convolution, state space).
    """

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.rounds = model, device == "gpu"

    def inputs(self, batch: Batch, layouts: Sequence[MicroBatchShape]) -> list[Inputs]:
        rows = [row for row in single_rows(batch) if row.label_tokens]
        return [inputs_of(row, self._layout(row.shape)) for row in rows]

    def _layout(self, shape: MicroBatchShape) -> MicroBatchShape:
        if not self.rounds:
            return shape
        width = rounded(shape.width, *_WIDTHS)
        return MicroBatchShape(1, width, width, rounded(shape.labels, *_WIDTHS))

    def loss(self, inputs: Inputs, chunk: int) -> mx.array:
        logits = self.model(inputs.ids[None])[0][inputs.label_positions].astype(mx.float32)
        at_target = mx.take_along_axis(logits, inputs.targets[:, None], axis=-1)[:, 0]
        return ((log_sum_exp(logits) - at_target) * inputs.loss_weights).sum()

    def logits(self, ids: np.ndarray, positions: np.ndarray | None) -> mx.array:
        logits = self.model(mx.array(np.asarray(ids, np.int32))[None])[0].astype(mx.float32)
        return logits if positions is None else logits[mx.array(positions)]

    def continuing(self) -> Continue:
        from mlx_lm.models.cache import make_prompt_cache

        caches: list[Any] = []

        def forward(ids: list[int], restart: bool) -> mx.array:
            nonlocal caches
            if restart:
                caches = make_prompt_cache(self.model)
            return self.model(mx.array(ids)[None], cache=caches)[0, -1].astype(mx.float32)

        return forward

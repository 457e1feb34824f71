"""What each of several ranks computes of a step and of a validation, where all have to compute something."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.backend import Batch

_ROWS = ("input_ids", "targets", "loss_weights")  # of a batch, [B, T]


def evened(micro_batches: Sequence[Batch], size: int) -> list[Batch]:
    """With empty ones, so that each rank has as many: the ranks compute each of a sharded model's layers together."""
    counts = Counter(batch.rank for batch in micro_batches)
    most = max(counts.values())
    return [*micro_batches, *(_empty(rank) for rank in range(size) for _ in range(most - counts[rank]))]


def _empty(rank: int) -> Batch:
    ids = np.zeros((1, 1), np.int32)
    return Batch(ids, ids, np.zeros((1, 1), np.float32), np.ones(1, np.int32), rank)


def with_rows(batch: Batch, size: int) -> Batch:
    """With empty rows where it has fewer than `size`, so that each rank has one."""
    missing = ((0, max(0, size - len(batch.lengths))), (0, 0))
    padded: dict[str, Any] = {name: np.pad(getattr(batch, name), missing) for name in _ROWS}
    return replace(batch, lengths=np.pad(batch.lengths, missing[0], constant_values=1), **padded)


def share(batch: Batch, rank: int, size: int) -> Batch | None:
    """The rows of one rank: every so many, so that all have rows of like lengths. None where there are fewer rows."""
    lengths = batch.lengths[rank::size]
    if not len(lengths):
        return None
    width = int(lengths.max())
    cut = {name: getattr(batch, name)[rank::size, :width] for name in _ROWS}
    return replace(batch, lengths=lengths, **cut)

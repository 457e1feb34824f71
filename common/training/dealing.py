"""A step's rows dealt out to computers of different speeds."""

from collections.abc import Sequence

import numpy as np

from common.backend import Batch
from common.data.batching import cut, single_rows


def deal_by_speed(batches: Sequence[Batch], speeds: Sequence[float], device: str = "cpu") -> list[list[Batch]]:
    """The rows of the micro-batches for each computer, such that all end together; again in micro-batches as large.

    speeds: tokens a second, of each computer; 0 gets no row.
    """
    rows = sorted((row for batch in batches for row in single_rows(batch)), key=lambda row: int(row.lengths[0]))
    largest = max((batch.input_ids.size for batch in batches), default=1)
    shares, loads = [list[Batch]() for _ in speeds], np.zeros(len(speeds))
    usable = [number for number, speed in enumerate(speeds) if speed > 0]
    for row in reversed(rows):
        chosen = min(usable, key=lambda number: (loads[number] + row.tokens) / speeds[number])
        loads[chosen] += row.tokens
        shares[chosen].append(row)
    return [regrouped(share[::-1], largest, rank, device) for rank, share in enumerate(shares)]


def regrouped(rows: Sequence[Batch], micro_batch_tokens: int, rank: int = 0, device: str = "cpu") -> list[Batch]:
    """Single rows, rising in length, in micro-batches of at most so many padded tokens."""
    cuts = cut([row.tokens for row in rows], micro_batch_tokens, device)
    return [_together(rows[start:end], rank) for start, end in cuts]


def _together(rows: Sequence[Batch], rank: int) -> Batch:
    width = max(row.tokens for row in rows)

    def padded(name: str) -> np.ndarray:
        return np.concatenate([np.pad(getattr(row, name), ((0, 0), (0, width - row.tokens))) for row in rows])

    lengths = np.concatenate([row.lengths for row in rows])
    return Batch(padded("input_ids"), padded("targets"), padded("loss_weights"), lengths, rank)

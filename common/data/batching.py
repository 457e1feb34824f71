"""Seeded order, micro-batches of rows of similar length, padding, shifted labels: numpy only, for every backend."""

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.backend import Batch
from common.data.encode import Encoded

# In tokens: the cost of one more micro-batch, by device, and of a padded position, which only attention computes.
# cuda: on an H200 1,000 (Gemma-3-1B) to 3,900 (SmolLM2-135M); of Apple's GPUs not measured.
START_COST = {"cpu": 64, "cuda": 1024, "gpu": 512, "mps": 512}
_PADDING_COST = 0.25
# The sizes that CUDA graphs are recorded for: the smallest, and how many from one power of two to the next.
TOKEN_STEPS = (128, 8)
LABEL_STEPS = (128, 2)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return math.ceil(rows / batch_size)


def step_rows(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Row numbers of optimizer step `step` (from 1). Depends on nothing else, so a resumed run needs no state.

    Every epoch has an order of its own; its last step takes the rows that are left.
    """
    epoch, position = divmod(step - 1, steps_per_epoch(rows, batch_size))
    return _epoch_order(rows, seed, epoch)[position * batch_size : (position + 1) * batch_size].tolist()


@lru_cache(maxsize=1)  # the steps of an epoch come one after another
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 2, epoch]).permutation(rows)


def micro_batches(rows: Sequence[Encoded], micro_batch_tokens: int, device: str = "cpu", ranks: int = 1) -> list[Batch]:
    """The rows sorted by length and split where it costs least, at most `micro_batch_tokens` padded tokens a batch.

    ranks: of which each gets as much work as the others; their batches come one rank after another.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    lengths, batches = [len(row.ids) - 1 for row in ordered], list[Batch]()
    for rank, dealt in enumerate(deal(lengths, ranks)):
        for start, end in cut([lengths[i] for i in dealt], micro_batch_tokens, device):
            batches.append(make_batch([ordered[i] for i in dealt[start:end]], rank))
    return batches


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank the numbers of its rows, rising: the longest first, each to the rank with the fewest tokens.

    lengths: rising.
    """
    if ranks == 1:
        return [[*range(len(lengths))]]
    dealt, loads = [list[int]() for _ in range(ranks)], [(0, rank) for rank in range(ranks)]  # loads: a heap
    for number in reversed(range(len(lengths))):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + lengths[number], rank))
        dealt[rank].append(number)
    return [numbers[::-1] for numbers in dealt]


def cut(lengths: Sequence[int], micro_batch_tokens: int, device: str = "cpu") -> list[tuple[int, int]]:
    """`(start, end)` of each micro-batch of rows with these ascending lengths. Optimal, by dynamic programming.

    A row longer than `micro_batch_tokens` is a batch of its own.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # least cost of the first i rows, and where their last batch starts
    for end in range(1, len(lengths) + 1):
        choices, real = [], 0
        for start in range(end - 1, -1, -1):
            padded, real = (end - start) * lengths[end - 1], real + lengths[start]
            if padded > micro_batch_tokens and end - start > 1:
                break
            choices.append((best[start][0] + _PADDING_COST * (padded - real) + START_COST[device], start))
        best.append(min(choices))
    cuts, end = [], len(lengths)
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    return cuts[::-1]


def make_batch(rows: Sequence[Encoded], rank: int = 0) -> Batch:
    """The rows padded on the right, [rows, width]. Padding weighs 0 by its position, whatever its id is."""
    lengths = np.array([len(row.ids) - 1 for row in rows], np.int32)
    width = int(lengths.max())
    input_ids, targets = np.zeros((2, len(rows), width), np.int32)
    loss_weights = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]], targets[i, : lengths[i]] = row.ids[:-1], row.ids[1:]
        loss_weights[i, : lengths[i]] = row.loss_weights[1:]
    return Batch(input_ids, targets, loss_weights, lengths, rank)


def rounded(size: int, least: int, steps: int) -> int:
    """`size` rounded up to a multiple of `least`, with `steps` values between a power of two and the next."""
    step = max(least, 2 ** max(0, size.bit_length() - 1) // steps)
    return -(-size // step) * step


def single_rows(batch: Batch) -> list[Batch]:
    """A micro-batch for each row, without padding."""
    return [
        Batch(
            batch.input_ids[i : i + 1, :n],
            batch.targets[i : i + 1, :n],
            batch.loss_weights[i : i + 1, :n],
            batch.lengths[i : i + 1],
            batch.rank,
        )
        for i, n in enumerate(batch.lengths.tolist())
    ]


def split_batch(batch: Batch, limit: int | None) -> list[Batch]:
    """The rows of up to `limit` tokens, then the longer ones: RoPE of a row depends on its own length only."""
    longer = batch.lengths > (limit or batch.input_ids.shape[1])
    if longer.all() or not longer.any():
        return [batch]
    parts = []
    for rows in (~longer, longer):
        width = int(batch.lengths[rows].max())
        ids, targets, weights = (array[rows, :width] for array in (batch.input_ids, batch.targets, batch.loss_weights))
        parts.append(Batch(ids, targets, weights, batch.lengths[rows]))
    return parts

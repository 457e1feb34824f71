"""Shapes to which the micro-batches of a run are rounded up, so that a device that compiles each shape sees few."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.backend import Batch
from common.data.batching import rounded
from common.memory_terms import MicroBatchShape

_MOST = 8  # layouts
_WIDTH = 128  # fused attention has a gradient for its multiples
# The smallest size, and how many from one power of two to the next: the finest with few enough layouts to begin with.
_STEPS = ((64, 4), (128, 2), (256, 1))
_FEW = 1000
_COSTS = np.array([0.0, 0.0, 1.0, 0.5])  # of one more row, width, token and label, in tokens
_POSITION_COST = 0.25  # of a position that only attention computes, in tokens
_LAYOUT_COST = 50_000  # of one more layout, in tokens; not measured on a Mac


def choose_layouts(shapes: Counter[MicroBatchShape]) -> list[MicroBatchShape]:
    """At most eight layouts, each as large as the micro-batches it holds; few cost more padding, many more compiling.

    shapes: how many micro-batches have which. Two layouts are joined as long as that costs less than it saves, always
    those where it costs least. No joined one has more tokens, positions or attention scores than the micro-batch that
    has most of these, even if more than eight are left then; in all it may take more memory than each micro-batch.
    """
    return [*_chosen(tuple(sorted(shapes.items())))]


@lru_cache(maxsize=16)  # a plan is estimated with checkpointing and without
def _chosen(shapes: tuple[tuple[MicroBatchShape, int], ...]) -> tuple[MicroBatchShape, ...]:
    for steps in _STEPS:
        counts = Counter[MicroBatchShape]()
        for own, count in shapes:
            counts[smallest_layout(own, steps)] += count
        if len(counts) <= _FEW:
            break
    layouts, number = np.array([*counts], float).reshape(-1, 4), np.array([*counts.values()], float)
    most = _bounds(layouts).max(axis=0, initial=0)
    left = np.ones(len(layouts), bool)

    def cost_of_joining(at: int) -> np.ndarray:
        """[N]: with each of the layouts that are left."""
        joined, cost = np.maximum(layouts, layouts[at]), _cost(layouts)
        more = number * (_cost(joined) - cost) + number[at] * (_cost(joined) - cost[at])
        more[~left | (_bounds(joined) > most).any(axis=1)] = np.inf
        more[at] = np.inf
        return more

    more = np.array([cost_of_joining(at) for at in range(len(layouts))])
    while left.sum() > 1:
        one, other = np.unravel_index(np.argmin(more), more.shape)
        if more[one, other] > (_LAYOUT_COST if left.sum() <= _MOST else np.finfo(float).max):
            break
        layouts[one] = np.maximum(layouts[one], layouts[other])
        number[one], left[other] = number[one] + number[other], False
        more[other], more[:, other] = np.inf, np.inf
        more[one] = more[:, one] = cost_of_joining(int(one))
    order = np.argsort(-number, kind="stable")
    return tuple(MicroBatchShape(*map(int, layouts[at])) for at in order if left[at])


def layout_for(own: MicroBatchShape, layouts: Sequence[MicroBatchShape]) -> MicroBatchShape:
    """The layout that holds the micro-batch at the least cost; where none does, its own sizes rounded."""
    fitting = [layout for layout in layouts if _holds(layout, own)]
    return min(fitting, key=lambda layout: float(_cost(np.array(layout, float)))) if fitting else smallest_layout(own)


def fitted(batch: Batch, layouts: Sequence[MicroBatchShape]) -> list[Batch]:
    """The micro-batch in parts, as large as the layouts hold; a row that none holds is a part of its own.

    A validation's micro-batches have as many rows as memory allows, and those of training no more than a step has.
    """
    if not layouts or any(_holds(layout, batch.shape) for layout in layouts):
        return [batch]
    labels = (batch.loss_weights > 0).sum(axis=1)

    def shape(start: int, end: int) -> MicroBatchShape:
        lengths = batch.lengths[start:end]
        return MicroBatchShape(end - start, int(lengths.max()), int(lengths.sum()), int(labels[start:end].sum()))

    parts, start, count = list[Batch](), 0, len(batch.lengths)
    for end in range(1, count + 1):
        if end == count or not any(_holds(layout, shape(start, end + 1)) for layout in layouts):
            width = shape(start, end).width
            names = ("input_ids", "targets", "loss_weights")
            ids, targets, loss_weights = (getattr(batch, name)[start:end, :width] for name in names)
            parts.append(Batch(ids, targets, loss_weights, batch.lengths[start:end], batch.rank))
            start = end
    return parts


def smallest_layout(
    own: MicroBatchShape, steps: tuple[int, int] = _STEPS[0], widest: int | None = None
) -> MicroBatchShape:
    """Its own sizes rounded up, the width to no more than `widest`."""
    tokens, labels = (rounded(size, *steps) for size in (own.tokens, own.labels))
    width = rounded(own.width, _WIDTH, 4)
    width = width if widest is None else min(width, widest)
    return MicroBatchShape(max(own.rows, -(-tokens // width)), width, tokens, labels)


def _holds(layout: MicroBatchShape, own: MicroBatchShape) -> bool:
    return all(size <= most for size, most in zip(own, layout, strict=True))


def _bounds(layouts: np.ndarray) -> np.ndarray:
    """[..., 3], what memory depends on: tokens, positions, and scores of attention, which some devices write out."""
    positions = _positions(layouts)
    return np.stack([layouts[..., 2], positions, positions * layouts[..., 1]], axis=-1)


def _positions(layouts: np.ndarray) -> np.ndarray:
    found: np.ndarray = layouts[..., 0] * layouts[..., 1]
    return found


def _cost(layouts: np.ndarray) -> np.ndarray:
    """In tokens, of layouts [..., 4]."""
    found: np.ndarray = layouts @ _COSTS + _POSITION_COST * _positions(layouts)
    return found

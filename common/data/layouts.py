"""Shapes to which the micro-batches of a run are rounded up, so that a device that compiles each shape sees few."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

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
    those where it costs least; never to one that takes more memory than the largest, even if more than eight are left.
    """
    for steps in _STEPS:
        counts = Counter[MicroBatchShape]()
        for own, count in shapes.items():
            counts[smallest_layout(own, steps)] += count
        if len(counts) <= _FEW:
            break
    layouts, number = np.array([*counts], float).reshape(-1, 4), np.array([*counts.values()], float)
    most = layouts[:, 2].max(initial=0), _positions(layouts).max(initial=0)
    left = np.ones(len(layouts), bool)

    def cost_of_joining(at: int) -> np.ndarray:
        """[N]: with each of the layouts that are left."""
        joined, cost = np.maximum(layouts, layouts[at]), _cost(layouts)
        more = number * (_cost(joined) - cost) + number[at] * (_cost(joined) - cost[at])
        more[~left | (joined[:, 2] > most[0]) | (_positions(joined) > most[1])] = np.inf
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
    return [MicroBatchShape(*map(int, layouts[at])) for at in order if left[at]]


def layout_for(own: MicroBatchShape, layouts: Sequence[MicroBatchShape]) -> MicroBatchShape:
    """The layout that holds the micro-batch at the least cost.

    Where none does, its own sizes rounded; without any layouts these as they are.
    """
    if not layouts:
        return own
    fitting = [layout for layout in layouts if all(size <= most for size, most in zip(own, layout, strict=True))]
    return min(fitting, key=lambda layout: float(_cost(np.array(layout, float)))) if fitting else smallest_layout(own)


def _positions(layouts: np.ndarray) -> np.ndarray:
    found: np.ndarray = layouts[..., 0] * layouts[..., 1]
    return found


def smallest_layout(own: MicroBatchShape, steps: tuple[int, int] = _STEPS[0]) -> MicroBatchShape:
    """Its own sizes rounded up."""
    tokens, labels = (rounded(size, *steps) for size in (own.tokens, own.labels))
    width = rounded(own.width, _WIDTH, 4)
    return MicroBatchShape(max(own.rows, -(-tokens // width)), width, tokens, labels)


def _cost(layouts: np.ndarray) -> np.ndarray:
    """In tokens, of layouts [..., 4]."""
    found: np.ndarray = layouts @ _COSTS + _POSITION_COST * _positions(layouts)
    return found

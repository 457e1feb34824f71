"""Bootstrap intervals of figures that are computed from sums over rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
_AT_ONCE = 1 << 23  # numbers held at a time

# From statistics summed over rows, [S], to the figure.
FromSums = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval: None where there are fewer than two rows to draw from."""

    value: float
    low: float | None
    high: float | None
    rows: int

    @property
    def interval(self) -> list[float]:
        return [] if self.low is None or self.high is None else [self.low, self.high]

    def __format__(self, form: str) -> str:
        """`0.980 [0.950, 1.000]` for `.3f`."""
        within = ", ".join(f"{bound:{form}}" for bound in self.interval)
        return f"{self.value:{form}}" + (f" [{within}]" if within else "")

    def record(self) -> dict[str, float | int | None]:
        return asdict(self)

    def through(self, change: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the figure."""
        low, high = (None if bound is None else change(bound) for bound in (self.low, self.high))
        return Estimate(change(self.value), low, high, self.rows)


def mean(sums: np.ndarray) -> float:
    """The first statistic by the second: a mean where the second counts, or weighs, the rows."""
    return float(sums[0] / sums[1])


def perplexity(loss: float) -> float:
    """Of a mean loss; beyond what floats hold, the largest."""
    return math.exp(min(loss, 709))


def estimate(statistics: np.ndarray, figure: FromSums, seed: int) -> Estimate:
    """Of rows with these statistics [N, S]; percentiles of the figure over resampled rows (Efron 1979)."""
    values = [figure(sums) for sums in _resampled(statistics, seed)]
    return _estimate(figure(statistics.sum(axis=0)), values, len(statistics))


def difference(statistics: np.ndarray, base: np.ndarray, figure: FromSums, seed: int) -> Estimate:
    """How far the figure is above that of `base`, which has statistics of the same rows.

    Paired: both figures are of the same resampled rows.
    """
    pairs = zip(_resampled(statistics, seed), _resampled(base, seed), strict=True)
    values = [figure(ours) - figure(theirs) for ours, theirs in pairs]
    return _estimate(figure(statistics.sum(axis=0)) - figure(base.sum(axis=0)), values, len(statistics))


def _resampled(statistics: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The sums [S] over each of RESAMPLES draws of as many rows, with replacement. One seed gives the same draws."""
    rows, random = len(statistics), np.random.default_rng([seed, 5])
    for first in range(0, RESAMPLES, step := max(1, _AT_ONCE // rows)):
        count = min(step, RESAMPLES - first)
        yield from random.multinomial(rows, np.full(rows, 1 / rows), size=count) @ statistics


def _estimate(value: float, values: list[float], rows: int) -> Estimate:
    if rows < 2:
        return Estimate(value, None, None, rows)
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), rows)

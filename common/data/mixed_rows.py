"""Rows of several sources as one sequence."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from typing import Any, overload

import numpy as np

from common.data.dataset import Example
from common.data.facts import Facts, KnownRows, facts_of, sources_of, take


@dataclass(frozen=True)
class JoinedSources(Sequence[str]):
    """The sources of the rows of several parts, or of some of these."""

    parts: Sequence[Sequence[str]]
    numbers: np.ndarray | None = None  # which of them; None: all

    @cached_property
    def _ends(self) -> list[int]:
        return [*accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self._ends[-1] if self.numbers is None else len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "JoinedSources": ...
    def __getitem__(self, at: Any) -> Any:
        numbers = np.arange(len(self)) if self.numbers is None else self.numbers
        if isinstance(at, slice):
            return replace(self, numbers=numbers[at])
        number = int(numbers[at])
        part = bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]


@dataclass(frozen=True)
class MixedRows(KnownRows):
    """Rows of several parts, one part after the other. A row that is drawn twice is held once."""

    parts: tuple[Sequence[Example], ...]
    part_facts: Facts  # of all rows of all parts
    numbers: np.ndarray  # [N]: which of all rows of the parts; they ascend, and may repeat

    @staticmethod
    def of(parts: Sequence[Sequence[Example]], numbers: Sequence[np.ndarray]) -> "MixedRows":
        """numbers: for each part, which of its rows."""
        starts = [0, *accumulate(map(len, parts))]
        shifted = [start + which for start, which in zip(starts, numbers, strict=False)]
        return MixedRows(tuple(parts), Facts.joined([facts_of(part) for part in parts]), np.concatenate(shifted))

    @cached_property
    def facts(self) -> Facts:  # type: ignore[override]
        return self.part_facts.take(self.numbers)

    @cached_property
    def sources(self) -> JoinedSources:  # type: ignore[override]
        return JoinedSources([sources_of(part) for part in self.parts], self.numbers)

    def take(self, chosen: np.ndarray) -> "MixedRows":
        return replace(self, numbers=self.numbers[chosen])

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Example]:
        start = 0
        for part in self.parts:
            end = start + len(part)
            own = self.numbers[(self.numbers >= start) & (self.numbers < end)] - start
            which, counts = np.unique(own, return_counts=True)
            for row, count in zip(take(part, which), counts.tolist(), strict=True):
                yield from [row] * count
            start = end

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "MixedRows": ...
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        number = range(len(self))[at]
        return next(islice(self.take(np.array([number])), 1))


def distinct(rows: Sequence[Example]) -> Sequence[Example]:
    """The rows, each once."""
    return replace(rows, numbers=np.unique(rows.numbers)) if isinstance(rows, MixedRows) else rows

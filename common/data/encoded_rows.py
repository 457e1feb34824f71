"""Encoded rows in flat arrays: in memory, or mapped from the files of a cache."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, overload

import numpy as np

from common.data.dataset import Example
from common.data.encode import Encoded, compact
from common.data.mixed_rows import JoinedSources
from common.recipe import VERSION


class Kind(NamedTuple):
    """What many rows have in common; as in `Encoded`."""

    ends: tuple[int, ...]
    notes: tuple[str, ...]
    text: bool
    control: tuple[str, ...]


@dataclass(frozen=True)
class FlatRows:
    """N rows one behind the other, T tokens in all."""

    ids: np.ndarray  # [T] int32
    weights: np.ndarray  # [T], as Encoded.loss_weights; float32 where a label of any of the rows does not weigh 1
    lengths: np.ndarray  # [N] int32
    labels: np.ndarray  # [N] int32: label tokens
    lightest: np.ndarray  # [N] float32: the least weight of a label; 1 without any
    heaviest: np.ndarray  # [N] float32: the largest
    digests: np.ndarray  # [N, 32] uint8
    kinds: np.ndarray  # [N] int32: which of `table`
    table: list[Kind]

    @staticmethod
    def of(rows: Sequence[Encoded]) -> "FlatRows":
        table: dict[Kind, int] = {}
        kinds = [table.setdefault(Kind(row.ends, row.notes, row.text, row.control), len(table)) for row in rows]
        lightest, heaviest = np.ones((2, len(rows)), np.float32)
        for at, row in enumerate(rows):
            if row.loss_weights.dtype != bool:
                weights = row.loss_weights[row.mask]
                lightest[at], heaviest[at] = weights.min(), weights.max()
        return FlatRows(
            np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)]),
            np.concatenate([np.zeros(0, bool), *(row.loss_weights for row in rows)]),
            np.array([len(row.ids) for row in rows], np.int32),
            np.array([row.label_tokens for row in rows], np.int32),
            lightest,
            heaviest,
            np.frombuffer(b"".join(map(row_digest, rows)), np.uint8).reshape(-1, 32),
            np.array(kinds, np.int32),
            [*table],
        )

    @staticmethod
    def joined(parts: Sequence["FlatRows"]) -> "FlatRows":
        kinds, table = _joined_kinds(parts)
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS if name != "kinds"}
        return FlatRows(**arrays, kinds=kinds, table=table)


def _joined_kinds(parts: Sequence[FlatRows]) -> tuple[np.ndarray, list[Kind]]:
    """`kinds` and `table` of all parts together."""
    table: dict[Kind, int] = {}
    own = [np.array([table.setdefault(kind, len(table)) for kind in part.table], np.int32) for part in parts]
    return np.concatenate([numbers[part.kinds] for numbers, part in zip(own, parts, strict=True)]), [*table]


ARRAYS = [name for name in FlatRows.__dataclass_fields__ if name != "table"]
_OF_ROWS = ("lengths", "labels", "lightest", "heaviest", "digests")


class Store:
    """Rows of several FlatRows. sources: of each row."""

    def __init__(self, parts: Sequence[FlatRows], sources: Sequence[str]) -> None:
        self.sources, self.parts = sources, parts
        self.kinds, self.table = _joined_kinds(parts)
        self.lengths, self.labels, self.lightest, self.heaviest, self.digests = (
            np.concatenate([getattr(part, name) for part in parts]) for name in _OF_ROWS
        )
        self._part = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.lengths) for part in parts])
        self._starts = [np.cumsum(part.lengths, dtype=np.int64) - part.lengths for part in parts]
        self._start = np.concatenate(self._starts)  # of each row in its part

    def tokens(self, row: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, loss weights)` of these of a row's tokens; float32 as in its part."""
        part, start = self.parts[self._part[row]], int(self._start[row])
        return part.ids[start + first : start + last], part.weights[start + first : start + last]

    def begin_unlabeled(self) -> np.ndarray:
        """[N] bool: the rows whose first token is not a label."""
        pairs = zip(self.parts, self._starts, strict=True)
        return np.concatenate([part.weights[starts] == 0 for part, starts in pairs])


@dataclass(frozen=True)
class EncodedRows(Sequence[Encoded]):
    """Rows of a store, or what is left of them where they are cut."""

    store: Store = field(repr=False)
    rows: np.ndarray  # [N] int64: which of the store
    first: np.ndarray  # [N] int32: the first token of each
    last: np.ndarray  # [N] int32: one beyond the last
    bos: np.ndarray  # [N] bool: where the row's own first token comes before these

    @staticmethod
    def of(rows: Sequence[Encoded]) -> "EncodedRows":
        """The rows in memory."""
        if isinstance(rows, EncodedRows):
            return rows
        return EncodedRows.every(Store([FlatRows.of(rows)], [row.source for row in rows]))

    @staticmethod
    def every(store: Store) -> "EncodedRows":
        """All rows of the store."""
        count = len(store.lengths)
        return EncodedRows(
            store, np.arange(count), np.zeros(count, np.int32), store.lengths.copy(), np.zeros(count, bool)
        )

    @staticmethod
    def joined(parts: Sequence["EncodedRows"]) -> "EncodedRows":
        """The rows of all parts, as rows of one store; no token is copied."""
        stores = [part.store for part in parts]
        store = Store([flat for one in stores for flat in one.parts], JoinedSources([one.sources for one in stores]))
        starts = [0, *accumulate(len(one.lengths) for one in stores)]
        rows = np.concatenate([start + part.rows for start, part in zip(starts, parts, strict=False)])
        others = (np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "last", "bos"))
        return EncodedRows(store, rows, *others)

    def take(self, chosen: np.ndarray) -> "EncodedRows":
        """The rows with these indices, or where this is true."""
        return EncodedRows(self.store, *(part[chosen] for part in (self.rows, self.first, self.last, self.bos)))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> "EncodedRows": ...
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        row = int(self.rows[at])
        ids, weights = self.store.tokens(row, int(self.first[at]), int(self.last[at]))
        if self.bos[at]:
            begin, weight = self.store.tokens(row, 0, 1)
            ids, weights = np.concatenate((begin, ids)), np.concatenate((weight, weights))
        weights = weights if weights.dtype == bool else compact(weights)
        return Encoded(ids, weights, self.store.sources[row], *self.store.table[self.store.kinds[row]])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N]: tokens of each row."""
        return self.last - self.first + self.bos

    @cached_property
    def whole(self) -> np.ndarray:
        """[N] bool: the rows that are not cut."""
        return self.lengths == self.store.lengths[self.rows]

    @cached_property
    def label_tokens(self) -> np.ndarray:
        """[N]: label tokens of each row."""
        found = self.store.labels[self.rows]
        for at in np.flatnonzero(~self.whole):
            found[at] = self[int(at)].label_tokens
        return found

    def digests(self) -> np.ndarray:
        """[N, 32] uint8: SHA-256 of each row's ids and loss weights."""
        found = self.store.digests[self.rows]
        for at in np.flatnonzero(~self.whole):
            found[at] = np.frombuffer(row_digest(self[int(at)]), np.uint8)
        return found

    def of_kind(self, wanted: Callable[[Kind], object]) -> np.ndarray:
        """[N] bool: the rows of the kinds that are wanted."""
        return np.array([bool(wanted(kind)) for kind in self.store.table], bool)[self.store.kinds[self.rows]]

    def are_weighted(self) -> np.ndarray:
        """[N] bool: the rows with a label that does not weigh 1."""
        return (self.store.lightest[self.rows] != 1) | (self.store.heaviest[self.rows] != 1)

    def weight_range(self) -> tuple[float, float]:
        """The least and the largest weight of their labels."""
        return float(self.store.lightest[self.rows].min()), float(self.store.heaviest[self.rows].max())

    def begin_unlabeled(self) -> np.ndarray:
        """[N] bool: the rows whose own first token, such as BOS, is not a label."""
        return self.store.begin_unlabeled()[self.rows]

    def kinds(self) -> list[tuple[Kind, int]]:
        """The kinds of the rows, each with how many are of it; those of earlier rows first."""
        kinds, first, counts = np.unique(self.store.kinds[self.rows], return_index=True, return_counts=True)
        order = np.argsort(first)
        return [(self.store.table[kinds[at]], int(counts[at])) for at in order]


def paired(examples: Iterable[Example], rows: EncodedRows) -> Iterator[tuple[Example, Encoded, bool]]:
    """Each row after the example it was made of; the third: whether it is not cut. Both are in one order."""
    left, example = iter(examples), None
    for row, whole in zip(rows, rows.whole, strict=True):
        while example is None or example.source != row.source:
            example = next(left)
        yield example, row, bool(whole)


def in_order(parts: Sequence[EncodedRows]) -> EncodedRows:
    """The rows of all parts, which are of one store, in its order; those of one row stay as they are."""
    columns = ([getattr(part, name) for part in parts] for name in ("rows", "first", "last", "bos"))
    found = EncodedRows(parts[0].store, *map(np.concatenate, columns))
    return found.take(np.argsort(found.rows, kind="stable"))


def row_digest(row: Encoded) -> bytes:
    """SHA-256 of the row's ids and loss weights."""
    return hashlib.sha256(row.ids.astype("<i4").tobytes() + row.loss_weights.astype("<f4").tobytes()).digest()


def rows_hash(*parts: Sequence[Encoded], version: int = VERSION) -> str:
    """SHA-256 over ids and loss weights of the rows of all parts, in order. version: of the recipe that holds it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        if version > 2:
            digest.update(EncodedRows.of(part).digests().tobytes())
            continue
        for row in part:
            digest.update(len(row.ids).to_bytes(8, "little"))
            digest.update(row.ids.astype("<i4").tobytes())
            digest.update(row.loss_weights.astype("<f4").tobytes())
    return digest.hexdigest()


def stop_ids(rows: EncodedRows) -> list[int]:
    """The ids that end an assistant turn, most frequent first: what the model must stop on when it is served."""
    ends: dict[int, int] = {}
    for kind, count in rows.kinds():
        for token in kind.ends:
            ends[token] = ends.get(token, 0) + count
    return sorted(ends, key=lambda token: -ends[token])

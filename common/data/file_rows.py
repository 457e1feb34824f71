"""The rows of a large file: read when they are asked for, known by what one pass over the file has found."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, overload

import numpy as np

from common.backend import Progress
from common.data.dataset import Counted, Example
from common.data.facts import Facts, KnownRows, Sources
from common.data.formats import read_row
from common.data.messages import Fault, LeftOut
from common.data.row_cache import Kept
from common.data.row_parts import Chunk, Work, parts_of
from common.data.row_source import NumberedRows, RowSource, parsed


@dataclass
class Found:
    """What reading rows has found besides them. The numbers are those of the source."""

    numbers: list[int] = field(default_factory=list)  # of the rows that can be read
    formats: Counter[str] = field(default_factory=Counter)  # how many of them came in which format
    left_out: dict[str, Counted[int]] = field(default_factory=dict)  # rows in which nothing is trained, by kind
    faults: Counted[tuple[int, str]] = field(default_factory=Counted)
    columns: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)  # columns

    def add(self, other: "Found") -> None:
        """All but the numbers."""
        self.formats += other.formats
        self.faults.extend(other.faults)
        self.columns |= other.columns
        self.unread |= other.unread
        for kind, numbers in other.left_out.items():
            self.left_out.setdefault(kind, Counted()).extend(numbers)


def read_all(rows: NumberedRows, name: str, fields: dict[str, str]) -> tuple[list[Example], Found]:
    """The rows that can be read, and what was found. name: of their source; fields: {part of a format: its column}."""
    examples, found = [], Found()
    for number, row in rows:
        if isinstance(row, dict):
            found.columns |= dict.fromkeys(map(str, row))
        try:
            if isinstance(row, Fault):
                raise row
            format, example, others = read_row(row, f"{name}:{number}", fields)
        except LeftOut as why:
            found.left_out.setdefault(why.kind, Counted()).add(number)
            continue
        except Fault as fault:
            found.faults.add((number, str(fault)))
            continue
        found.numbers.append(number)
        found.formats[format] += 1
        found.unread |= dict.fromkeys(others)
        examples.append(example)
    return examples, found


@dataclass(frozen=True)
class FileRows(KnownRows):
    """Rows of a source, in its order. To get one of them reads all before it."""

    source: RowSource
    fields: dict[str, str]
    file_facts: Facts  # of all rows of the source that can be read
    numbers: np.ndarray  # of these in the source
    ends: np.ndarray  # of each part: how many of these there are up to its end
    chosen: np.ndarray  # which of them are the rows

    @cached_property
    def facts(self) -> Facts:  # type: ignore[override]
        return self.file_facts.take(self.chosen)

    @cached_property
    def sources(self) -> Sources:  # type: ignore[override]
        return Sources(self.source.name, self.numbers[self.chosen])

    def take(self, chosen: np.ndarray) -> "FileRows":
        return replace(self, chosen=self.chosen[chosen])

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Example]:
        wanted = iter(self.sources.numbers.tolist())
        number = next(wanted, None)
        for at, row in self.source.rows():
            if number is None:
                return
            if at == number:
                examples, _ = read_all(parsed([(at, row)]), self.source.name, self.fields)
                if not examples:
                    raise self.source.changed()
                yield examples[0]
                number = next(wanted, None)
        if number is not None:
            raise self.source.changed()

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> "FileRows": ...
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        number = range(len(self))[at]
        return next(islice(self, number, None))


def read_file(source: RowSource, fields: dict[str, str], progress: Progress) -> tuple[FileRows, Found]:
    """All rows that can be read, and what was found, by one pass over the source in several processes.

    It is kept in the cache. Raises UserError where the source cannot be read.
    """
    settings = ["found", sorted(fields.items())]
    work = Work(settings, partial(_read_chunk, source.name, fields), _found_in_part)
    found, facts, numbers = Found(), list[Facts](), list[np.ndarray]()
    with closing(parts_of(source, work, progress)) as parts:
        for arrays, record in parts:
            numbers.append(arrays.pop("numbers"))
            facts.append(Facts(**arrays))
            found.add(_found(record))
    every = np.concatenate(numbers)
    ends = np.cumsum([len(part) for part in numbers])
    return FileRows(source, fields, Facts.joined(facts), every, ends, np.arange(len(every))), found


def _read_chunk(name: str, fields: dict[str, str], chunk: Chunk) -> tuple[Facts, Found]:
    examples, found = read_all(parsed(chunk), name, fields)
    return Facts.of(examples), found


def _found_in_part(results: list[tuple[Facts, Found]]) -> Kept:
    found, numbers = Found(), list[int]()
    for _, more in results:
        numbers += more.numbers
        found.add(more)
    facts = Facts.joined([Facts.of([]), *(part for part, _ in results)])
    record = {
        "formats": found.formats,
        "left_out": {kind: asdict(rows) for kind, rows in found.left_out.items()},
        "faults": asdict(found.faults),
        "columns": [*found.columns],
        "unread": [*found.unread],
    }
    return {"numbers": np.array(numbers, np.int64), **vars(facts)}, record


def _found(record: dict[str, Any]) -> Found:
    """All but the numbers."""
    return Found(
        formats=Counter(record["formats"]),
        left_out={kind: Counted(**rows) for kind, rows in record["left_out"].items()},
        faults=Counted(record["faults"]["count"], [(number, fault) for number, fault in record["faults"]["first"]]),
        columns=dict.fromkeys(record["columns"]),
        unread=dict.fromkeys(record["unread"]),
    )

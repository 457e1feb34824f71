"""The rows of a large file: read when they are asked for, known by what one pass over the file has found."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from common.backend import Progress
from common.data.array_folder import read_arrays
from common.data.dataset import Example
from common.data.facts import Facts, KnownRows, Sources
from common.data.formats import read_row
from common.data.messages import Fault, LeftOut
from common.data.readers import NumberedRows, RowSource, not_utf8, parsed
from common.data.row_cache import cached_folder, keep
from common.system.workers import ordered_map, processes

_CHUNK_ROWS, _CHUNK_BYTES = 256, 1 << 20  # that a process is given at once
Chunk = list[tuple[int, Any]]  # rows with their numbers, those of JSON lines not parsed yet


@dataclass
class Found:
    """What reading rows has found besides them. The numbers are those of the source."""

    numbers: list[int] = field(default_factory=list)  # of the rows that can be read
    formats: Counter[str] = field(default_factory=Counter)  # how many of them came in which format
    left_out: dict[str, list[int]] = field(default_factory=dict)  # rows in which nothing is trained, by kind
    faults: list[tuple[int, str]] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)  # columns

    def add(self, other: "Found") -> None:
        """All but the numbers."""
        self.formats += other.formats
        self.faults += other.faults
        self.columns |= other.columns
        self.unread |= other.unread
        for kind, numbers in other.left_out.items():
            self.left_out.setdefault(kind, []).extend(numbers)


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
            found.left_out.setdefault(why.kind, []).append(number)
            continue
        except Fault as fault:
            found.faults.append((number, str(fault)))
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
    chosen: np.ndarray  # which of them are the rows

    @cached_property
    def facts(self) -> Facts:  # type: ignore[override]
        return self.file_facts.take(self.chosen)

    @cached_property
    def sources(self) -> Sources:  # type: ignore[override]
        return Sources(self.source.name, self.numbers[self.chosen])

    def take(self, chosen: np.ndarray) -> "FileRows":
        return FileRows(self.source, self.fields, self.file_facts, self.numbers, self.chosen[chosen])

    def whole_file(self) -> "FileRows":
        """All rows of the source."""
        return FileRows(self.source, self.fields, self.file_facts, self.numbers, np.arange(len(self.numbers)))

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Example]:
        for number, given in self.given():
            examples, _ = read_all(parsed([(number, given)]), self.source.name, self.fields)
            if not examples:
                raise self.source.changed()
            yield examples[0]

    def given(self) -> NumberedRows:
        """The rows as the source gives them."""
        wanted = iter(self.sources.numbers.tolist())
        number = next(wanted, None)
        for at, given in self.source.rows():
            if number is None:
                return
            if at == number:
                yield at, given
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
    folder = cached_folder(source, ["found", sorted(fields.items())]) / "found"
    if (kept := read_arrays(folder)) is None:
        found_now = _read(source, fields, progress)
        source.check_unchanged()
        kept = keep(folder, *found_now)
    arrays, record = kept
    found = Found(
        formats=Counter(record["formats"]),
        left_out=record["left_out"],
        faults=[(number, fault) for number, fault in record["faults"]],
        columns=dict.fromkeys(record["columns"]),
        unread=dict.fromkeys(record["unread"]),
    )
    numbers = arrays.pop("numbers")
    return FileRows(source, fields, Facts(**arrays), numbers, np.arange(len(numbers))), found


def _read(
    source: RowSource, fields: dict[str, str], progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record of what is found."""
    found, parts, numbers = Found(), [Facts.of([])], [np.zeros(0, np.int64)]
    size, done = source.size, 0
    work = partial(_read_chunk, source.name, fields)
    try:
        for facts, more, read in ordered_map(work, chunks(source.rows()), processes()):
            parts.append(facts)
            numbers.append(np.array(more.numbers, np.int64))
            found.add(more)
            done += read
            progress(min(1.0, done / size), f"{found.formats.total():,} rows")
    except UnicodeDecodeError:
        raise not_utf8(Path(source.where)) from None
    arrays = {"numbers": np.concatenate(numbers), **vars(Facts.joined(parts))}
    record = vars(found) | {"columns": [*found.columns], "unread": [*found.unread]}
    del record["numbers"]
    return arrays, record


def _read_chunk(name: str, fields: dict[str, str], chunk: Chunk) -> tuple[Facts, Found, int]:
    """The third: bytes of the chunk's lines."""
    examples, found = read_all(parsed(chunk), name, fields)
    return Facts.of(examples), found, sum(len(given) + 1 for _, given in chunk if isinstance(given, bytes))


def chunks(rows: NumberedRows) -> Iterator[Chunk]:
    """The rows in lists that a process is given at once."""
    chunk, size = [], 0
    for number, given in rows:
        chunk.append((number, given))
        size += len(given) if isinstance(given, bytes) else 0
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

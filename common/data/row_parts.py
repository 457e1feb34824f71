"""Work on the rows of a large file: in several processes by chunks, and kept by parts, so that a stop costs one."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.backend import Progress
from common.data.array_folder import read_arrays
from common.data.row_cache import Kept, cached_folder, keep
from common.data.row_source import NumberedRows, Position, RowSource, not_utf8
from common.errors import UserError
from common.system.workers import no_beginning, ordered_map, processes

Result = TypeVar("Result")
Chunk = list[tuple[int, Any]]  # rows with their numbers, those of JSON lines not parsed yet

_CHUNK_ROWS, _CHUNK_BYTES = 1 << 8, 1 << 18  # at most, that a process is given at once
_PART_ROWS, _PART_BYTES = 1 << 13, 1 << 24  # from which on chunks are kept together


@dataclass(frozen=True)
class Work(Generic[Result]):
    """What is done with each chunk, and what is kept of a part."""

    settings: Any  # JSON: what decides the results, besides the rows
    function: Callable[[Chunk], Result]
    joined: Callable[[list[Result]], Kept]
    begin: Callable[..., None] = no_beginning  # called first in each process, with `given`
    given: tuple[Any, ...] = ()


def parts_of(source: RowSource, work: Work[Result], progress: Progress) -> Generator[Kept, None, None]:
    """What is kept of each part of the source, in order; what an earlier process has made is read from the cache.

    The parts are the same for all work. A missing or damaged one is made again, with those behind it. Raises UserError
    where the source cannot be read, or changes meanwhile.
    """
    with cached_folder(source, work.settings, progress) as folder:
        done, last = 0, 0
        for number in count():
            kept = read_arrays(_part(folder, number))
            if kept is None or kept[1]["part"] != [folder.name, number]:
                break
            yield kept
            done, last = kept[1]["done"], kept[1]["last"]
            progress(0.0, f"{done:,} rows")
            if kept[1]["end"]:
                return
        for results, at in _worked(source, work, done, last, progress):
            arrays, record = work.joined(results)
            source.check_unchanged()
            yield keep(_part(folder, number), arrays, record | at | {"part": [folder.name, number]})
            number += 1


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}"


def _worked(
    source: RowSource, work: Work[Result], done: int, last: int, progress: Progress
) -> Iterator[tuple[list[Result], dict[str, Any]]]:
    """The results of each part behind the row of number `last`, the first `done` rows, and where the part ends."""
    position, cut = Position(), deque[tuple[int, int, int]]()

    def chunks() -> Iterator[Chunk]:
        for chunk, size in _chunks((number, row) for number, row in source.read(position) if number > last):
            cut.append((chunk[-1][0], len(chunk), size))
            yield chunk

    results, rows, size = list[Result](), 0, 0
    end = last
    try:
        for result in ordered_map(work.function, chunks(), processes(), work.begin, work.given):
            end, more_rows, more_size = cut.popleft()
            results.append(result)
            rows, size, done = rows + more_rows, size + more_size, done + more_rows
            progress(position.share(), f"{done:,} rows")
            if rows >= _PART_ROWS or size >= _PART_BYTES:
                yield results, {"done": done, "last": end, "end": False}
                results, rows, size = [], 0, 0
    except UserError:
        source.check_unchanged()
        raise
    except UnicodeDecodeError:
        source.check_unchanged()
        raise not_utf8(Path(source.where)) from None
    yield results, {"done": done, "last": end, "end": True}


def _chunks(rows: NumberedRows) -> Iterator[tuple[Chunk, int]]:
    """The rows in lists that a process is given at once, each with its size."""
    chunk, size = Chunk(), 0
    for number, row in rows:
        chunk.append((number, row))
        size += _size(row)
        if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield chunk, size
            chunk, size = [], 0
    if chunk:
        yield chunk, size


def _size(row: Any) -> int:
    """About how many bytes a row, or a value in it, has."""
    if isinstance(row, (bytes, str)):
        return len(row)
    if isinstance(row, dict):
        return sum(len(key) + _size(value) for key, value in row.items())
    return sum(map(_size, row)) if isinstance(row, list) else 8

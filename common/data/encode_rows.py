"""All rows of a data set encoded: few in this process; those of a large file in several, and kept in the cache."""

import hashlib
import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from common.backend import Progress
from common.data.array_folder import read_arrays
from common.data.dataset import Example
from common.data.encode import Encoded, Encoder, MaskingOptions
from common.data.encoded_rows import ARRAYS, EncodedRows, FlatRows, Kind, Store
from common.data.facts import Sources
from common.data.file_rows import Chunk, FileRows, read_all
from common.data.readers import parsed
from common.data.row_cache import cached_folder, keep
from common.data.turn_edges import BadRow
from common.errors import UserError
from common.system.workers import ordered_map, processes

SHOWN = 10  # bad rows in an error
_TOGETHER = 64  # rows that are encoded at once
_PART = 1 << 13  # rows of a file that are kept together: what a stop may cost
_CHUNK = 256  # rows that a process is given at once
OnBadRow = Literal["error", "drop"]


def encode_parts(
    parts: Sequence[Sequence[Example]],
    encoder: Encoder,
    on_bad_row: OnBadRow,
    progress: Progress = lambda share, text: None,
) -> tuple[list[EncodedRows], list[BadRow]]:
    """`(the rows of each part encoded, the rows that are dropped)`.

    With on_bad_row `error` no more rows are tried once ten cannot be labeled. Raises UserError naming these.
    """
    work = _Work(encoder, on_bad_row, progress, sum(map(len, parts)))
    encoded = [work.file(part) if isinstance(part, FileRows) else work.rows(part) for part in parts]
    if work.bad and on_bad_row == "error":
        raise _refused(work.bad)
    return encoded, work.bad


class _Work:
    """What is encoded, and how far it is."""

    def __init__(self, encoder: Encoder, on_bad_row: OnBadRow, progress: Progress, count: int) -> None:
        self.encoder, self.on_bad_row, self.progress, self.count = encoder, on_bad_row, progress, count
        self.done, self.bad = 0, list[BadRow]()
        self._files: dict[int, _EncodedFile] = {}  # by id of the source

    def rows(self, rows: Sequence[Example]) -> EncodedRows:
        encoded: list[Encoded] = []
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            self.progress(self.done / self.count, some[0].source)
            found = self.encoder.encode_batch(some)
            encoded += [row for row in found if isinstance(row, Encoded)]
            self.add(len(some), [row for row in found if isinstance(row, BadRow)])
        return EncodedRows.of(encoded)

    def file(self, rows: FileRows) -> EncodedRows:
        if id(rows.source) not in self._files:
            self._files[id(rows.source)] = _encode_file(rows.whole_file(), self)
        return self._files[id(rows.source)].take(rows.chosen)

    def add(self, count: int, bad: list[BadRow]) -> None:
        self.done += count
        self.bad += bad
        if self.on_bad_row == "error" and len(self.bad) >= SHOWN:
            raise _refused(self.bad[:SHOWN])


def _refused(bad: list[BadRow]) -> UserError:
    """The error of rows that cannot be labeled."""
    fixes = " ".join(dict.fromkeys(row.fix for row in bad))
    title = f"{len(bad)} rows cannot be trained on" + (", and maybe more" if len(bad) == SHOWN else "")
    what = bad[0].what if len(bad) == 1 else "\n".join([f"{title}:", *(row.what for row in bad)])
    return UserError(what, f"{fixes} Or leave such rows out: --on-bad-row drop.")


@dataclass(frozen=True)
class _EncodedFile:
    encoded: EncodedRows
    place: np.ndarray  # of each row of the file among these; -1: it is bad

    def take(self, chosen: np.ndarray) -> EncodedRows:
        """Those of the file's rows with these indices."""
        places = self.place[chosen]
        return self.encoded.take(places[places >= 0])


@dataclass(frozen=True)
class _Part:
    """Rows of a file that are kept together."""

    flat: FlatRows
    rows: np.ndarray  # their indices in the file
    bad: list[BadRow]


def _encode_file(rows: FileRows, work: _Work) -> _EncodedFile:
    """Every row of the file. What an earlier process has encoded is read from the cache."""
    folder = cached_folder(rows.source, ["encoded", sorted(rows.fields.items()), _settings(work.encoder)])
    paths = [folder / f"rows-{start:09}" for start in range(0, len(rows), _PART)]
    parts: dict[int, _Part] = {}
    _allow_files(2 * len(paths))
    for number, path in enumerate(paths):
        work.progress(work.done / work.count, f"{work.done:,} rows")
        if (kept := read_arrays(path)) is not None:
            parts[number] = _part(*kept)
            work.add(len(parts[number].rows) + len(parts[number].bad), parts[number].bad)
    missing = np.flatnonzero(~np.isin(np.arange(len(rows)) // _PART, [*parts]))
    held: list[_Part] = []
    for chunk, part in _encoded_chunks(rows.take(missing), missing, work.encoder):
        work.add(len(chunk), part.bad)
        work.progress(work.done / work.count, f"{work.done:,} rows")
        held.append(part)
        last = chunk[-1]
        if last % _PART == _PART - 1 or last == len(rows) - 1:
            number, whole = last // _PART, _joined(held)
            rows.source.check_unchanged()
            arrays = {name: getattr(whole.flat, name) for name in ARRAYS} | {"rows": whole.rows}
            bad = [(row.source, row.reason, row.fix) for row in whole.bad]
            parts[number] = _part(*keep(paths[number], arrays, {"kinds": whole.flat.table, "bad": bad}))
            held = []
    return _encoded_file(rows, [parts[number] for number in range(len(paths))])


def _allow_files(more: int) -> None:
    """Let this process have so many more files open, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        with suppress(ValueError, OSError):  # beyond what macOS has for all
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _encoded_file(rows: FileRows, parts: list[_Part]) -> _EncodedFile:
    place, indices = np.full(len(rows), -1), np.concatenate([part.rows for part in parts])
    place[indices] = np.arange(len(indices))
    store = Store([part.flat for part in parts], Sources(rows.source.name, rows.sources.numbers[indices]))
    return _EncodedFile(EncodedRows.every(store), place)


def _part(arrays: dict[str, np.ndarray], record: dict[str, Any]) -> _Part:
    rows = arrays.pop("rows")
    table = [Kind(tuple(ends), tuple(notes), text, tuple(control)) for ends, notes, text, control in record["kinds"]]
    return _Part(FlatRows(**arrays, table=table), rows, [BadRow(*row) for row in record["bad"]])


def _joined(parts: list[_Part]) -> _Part:
    flat, rows = FlatRows.joined([part.flat for part in parts]), np.concatenate([part.rows for part in parts])
    return _Part(flat, rows, [row for part in parts for row in part.bad])


def _settings(encoder: Encoder) -> dict[str, Any]:
    """What decides how the encoder encodes a row."""
    tokenizer, backend = encoder.tokenizer, encoder.tokenizer.backend_tokenizer
    backend.no_truncation()  # as it encodes
    backend.no_padding()
    return {
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
        "special": json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True),
        "bos": encoder.bos,
        "masking": asdict(encoder.masking),
    }


def _encoded_chunks(rows: FileRows, indices: np.ndarray, encoder: Encoder) -> Iterator[tuple[list[int], _Part]]:
    """The rows, by chunks that lie in one part each. indices: of the rows in the file."""
    if not len(rows):
        return
    numbers = [*_cut(indices)]
    given = rows.given()
    work: Iterator[Chunk] = ([next(given) for _ in chunk] for chunk in numbers)
    start = _begin, (encoder.tokenizer, encoder.masking, rows.source.name, rows.fields)
    try:
        for chunk, (flat, places, bad) in zip(numbers, ordered_map(_encode, work, processes(), *start), strict=True):
            if len(places) + len(bad) < len(chunk):
                raise rows.source.changed()
            yield chunk, _Part(flat, np.array(chunk)[places], bad)
    except UnicodeDecodeError:
        raise rows.source.changed() from None


def _cut(indices: np.ndarray) -> Iterator[list[int]]:
    """The indices by chunks, each of one part."""
    for part in np.split(indices, np.flatnonzero(np.diff(indices // _PART)) + 1):
        yield from (part[start : start + _CHUNK].tolist() for start in range(0, len(part), _CHUNK))


_HELD: list[tuple[Encoder, str, dict[str, str]]] = []  # of this process


def _begin(tokenizer: Any, masking: MaskingOptions, name: str, fields: dict[str, str]) -> None:
    _HELD[:] = [(Encoder(tokenizer, masking), name, fields)]


def _encode(chunk: Chunk) -> tuple[FlatRows, list[int], list[BadRow]]:
    """`(rows encoded, their places in the chunk, bad rows)`."""
    encoder, name, fields = _HELD[0]
    examples, _ = read_all(parsed(chunk), name, fields)
    found = encoder.encode_batch(examples)
    places = [at for at, row in enumerate(found) if isinstance(row, Encoded)]
    encoded = [row for row in found if isinstance(row, Encoded)]
    return FlatRows.of(encoded), places, [row for row in found if isinstance(row, BadRow)]

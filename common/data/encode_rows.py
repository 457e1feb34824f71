"""All rows of a data set encoded: few in this process; those of a large file in several, and kept in the cache."""

import hashlib
import json
import resource
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from typing import Any, Literal

import numpy as np

from common.backend import Progress
from common.data.dataset import Counted, Example
from common.data.encode import Encoded, Encoder, MaskingOptions
from common.data.encoded_rows import ARRAYS, EncodedRows, FlatRows, Kind, Store
from common.data.facts import Sources
from common.data.file_rows import FileRows, read_all
from common.data.mixed_rows import MixedRows
from common.data.row_cache import Kept
from common.data.row_parts import Chunk, Work, parts_of
from common.data.row_source import parsed
from common.data.turn_edges import BadRow
from common.errors import UserError

SHOWN = 10  # bad rows in an error
_TOGETHER = 64  # rows that are encoded at once
OnBadRow = Literal["error", "drop"]


def encode_parts(
    parts: Sequence[Sequence[Example]],
    encoder: Encoder,
    on_bad_row: OnBadRow,
    progress: Progress = lambda share, text: None,
) -> tuple[list[EncodedRows], Counted[BadRow]]:
    """`(the rows of each part encoded, the rows that are dropped)`.

    With on_bad_row `error` no more rows are tried once ten cannot be labeled. Raises UserError naming these.
    """
    single = [rows for part in parts for rows in (part.parts if isinstance(part, MixedRows) else [part])]
    work = _Work(encoder, on_bad_row, progress, sum(map(len, single)))
    encoded = [work.every(part) for part in parts]
    if work.bad and on_bad_row == "error":
        raise _refused(work.bad.first)
    return encoded, work.bad


class _Work:
    """What is encoded, and how far it is."""

    def __init__(self, encoder: Encoder, on_bad_row: OnBadRow, progress: Progress, count: int) -> None:
        self.encoder, self.on_bad_row, self.progress, self.count = encoder, on_bad_row, progress, count
        self.done, self.bad = 0, Counted[BadRow]()
        self._files: dict[int, _Indexed] = {}  # by id of the source

    def every(self, rows: Sequence[Example]) -> EncodedRows:
        if isinstance(rows, MixedRows):
            return _Indexed.joined([self.indexed(part) for part in rows.parts]).take(rows.numbers)
        return self.indexed(rows).encoded

    def indexed(self, rows: Sequence[Example]) -> "_Indexed":
        """All of the rows."""
        return self.file(rows).of(rows.chosen) if isinstance(rows, FileRows) else self.rows(rows)

    def rows(self, rows: Sequence[Example]) -> "_Indexed":
        encoded: list[Encoded] = []
        good: list[bool] = []
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            self.progress(self.done / self.count, some[0].source)
            found = self.encoder.encode_batch(some)
            encoded += [row for row in found if isinstance(row, Encoded)]
            good += [isinstance(row, Encoded) for row in found]
            bad = [row for row in found if isinstance(row, BadRow)]
            self.add(len(some), Counted(len(bad), bad))
        return _Indexed(EncodedRows.of(encoded), _numbered(np.array(good, bool)))

    def file(self, rows: FileRows) -> "_Indexed":
        """All rows of its file."""
        if id(rows.source) not in self._files:
            self._files[id(rows.source)] = _encode_file(rows, self)
        return self._files[id(rows.source)]

    def add(self, count: int, bad: Counted[BadRow]) -> None:
        self.done += count
        self.bad.extend(bad)
        if self.on_bad_row == "error" and len(self.bad) >= SHOWN:
            raise _refused(self.bad.first[:SHOWN])


def _refused(bad: list[BadRow]) -> UserError:
    """The error of rows that cannot be labeled."""
    fixes = " ".join(dict.fromkeys(row.fix for row in bad))
    title = f"{len(bad)} rows cannot be trained on" + (", and maybe more" if len(bad) == SHOWN else "")
    what = bad[0].what if len(bad) == 1 else "\n".join([f"{title}:", *(row.what for row in bad)])
    return UserError(what, f"{fixes} Or leave such rows out: --on-bad-row drop.")


@dataclass(frozen=True)
class _Indexed:
    """Rows encoded, of which some are bad."""

    encoded: EncodedRows
    index: np.ndarray  # [N] of each row among these; -1: it is bad

    @staticmethod
    def joined(parts: Sequence["_Indexed"]) -> "_Indexed":
        starts = [0, *accumulate(len(part.encoded) for part in parts)]
        index = [np.where(part.index < 0, -1, part.index + at) for at, part in zip(starts, parts, strict=False)]
        return _Indexed(EncodedRows.joined([part.encoded for part in parts]), np.concatenate(index))

    def take(self, chosen: np.ndarray) -> EncodedRows:
        """Those of the rows with these indices that are not bad."""
        indices = self.index[chosen]
        return self.encoded.take(indices[indices >= 0])

    def of(self, chosen: np.ndarray) -> "_Indexed":
        """The rows with these indices alone."""
        good = self.index[chosen] >= 0
        return _Indexed(self.take(chosen), _numbered(good))


def _numbered(good: np.ndarray) -> np.ndarray:
    """[N]: of each that is good, which of the good ones it is; -1 for the others."""
    return np.where(good, np.cumsum(good) - 1, -1)


def _encode_file(rows: FileRows, work: _Work) -> _Indexed:
    """Every row of the file that `rows` are of. What an earlier process has encoded is read from the cache."""
    encoder, before, count = work.encoder, work.done, len(rows.numbers)
    settings = ["encoded", sorted(rows.fields.items()), _settings(encoder)]
    given = encoder.tokenizer, encoder.masking, rows.source.name, rows.fields

    def progress(share: float, text: str) -> None:
        work.progress((before + share * count) / work.count, text)

    _allow_files(2 * len(rows.ends))
    flat, indices = list[FlatRows](), list[np.ndarray]()
    with closing(parts_of(rows.source, Work(settings, _encode, _joined, _begin, given), progress)) as parts:
        for (arrays, record), start, end in zip(parts, [0, *rows.ends], rows.ends, strict=False):
            if record["rows"] != end - start:
                raise rows.source.changed()
            indices.append(start + arrays.pop("index"))
            flat.append(FlatRows(**arrays, table=[_kind(*kind) for kind in record["kinds"]]))
            bad = record["bad"]
            work.add(end - start, Counted(bad["count"], [BadRow(*row) for row in bad["first"]]))
    if len(flat) < len(rows.ends):
        raise rows.source.changed()
    labeled = np.concatenate(indices)
    index = np.full(count, -1)
    index[labeled] = np.arange(len(labeled))
    store = Store(flat, Sources(rows.source.name, rows.numbers[labeled]))
    return _Indexed(EncodedRows.every(store), index)


def _kind(ends: list[int], notes: list[str], text: bool, control: list[str]) -> Kind:
    return Kind(tuple(ends), tuple(notes), text, tuple(control))


def _allow_files(more: int) -> None:
    """Let this process have so many more files open, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        with suppress(ValueError, OSError):  # beyond what macOS has for all
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


_HELD: list[tuple[Encoder, str, dict[str, str]]] = []  # of this process


def _begin(tokenizer: Any, masking: MaskingOptions, name: str, fields: dict[str, str]) -> None:
    _HELD[:] = [(Encoder(tokenizer, masking), name, fields)]


def _encode(chunk: Chunk) -> tuple[FlatRows, np.ndarray, list[BadRow]]:
    """`(rows encoded, which of the rows that can be read are not bad, the bad ones)`."""
    encoder, name, fields = _HELD[0]
    examples, _ = read_all(parsed(chunk), name, fields)
    found = encoder.encode_batch(examples)
    encoded = [row for row in found if isinstance(row, Encoded)]
    good = np.array([isinstance(row, Encoded) for row in found], bool)
    return FlatRows.of(encoded), good, [row for row in found if isinstance(row, BadRow)]


def _joined(results: list[tuple[FlatRows, np.ndarray, list[BadRow]]]) -> Kept:
    flat = FlatRows.joined([FlatRows.of([]), *(rows for rows, _, _ in results)])
    good = np.concatenate([np.zeros(0, bool), *(which for _, which, _ in results)])
    bad = Counted[Any]()
    for row in chain.from_iterable(rows for _, _, rows in results):
        bad.add((row.source, row.reason, row.fix))
    arrays = {name: getattr(flat, name) for name in ARRAYS} | {"index": np.flatnonzero(good)}
    return arrays, {"kinds": flat.table, "bad": asdict(bad), "rows": len(good)}

"""The rows of a file, read by its ending, one after another: no more of it is in memory than must be."""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from common.data.json_list import JsonList, NotJson
from common.data.messages import Fault
from common.errors import UserError, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Each row with its number. As bytes: the JSON text of a line, still to be parsed. Else the row, or its Fault.
NumberedRows = Iterator[tuple[int, Any]]
_HEAD = 1 << 20  # bytes by which the layout of a JSON file, or a foreign encoding, is recognized
_PARQUET_ROWS = 1000


@dataclass(frozen=True)
class RowSource:
    """The rows of one file, or of one split of a data set on the hub."""

    where: str  # as messages name it
    name: str  # before the number of a row in the source of an Example
    unit: str  # what is counted: line or row
    rows: Callable[[], NumberedRows]  # raises UserError where it cannot be read
    kind: str  # how the files are read, and which rows of theirs
    files: tuple[Path, ...]  # that hold the rows; none where these can be read only once

    def place(self, number: int) -> str:
        """`train.jsonl line 17`."""
        return f"{self.name} {self.unit} {number}"

    def parsed(self) -> NumberedRows:
        """The rows, those of lines parsed: each an object, or what else the JSON is, or its Fault."""
        try:
            yield from parsed(self.rows())
        except UnicodeDecodeError:
            raise not_utf8(Path(self.where)) from None

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def stamps(self) -> list[tuple[int, int]]:
        """What shows that the files have changed since it was first asked for."""
        return [(stat.st_size, stat.st_mtime_ns) for stat in map(Path.stat, self.files)]

    def check_unchanged(self) -> None:
        """Raises UserError where a file has changed since."""
        if replace(self).stamps != self.stamps:
            raise self.changed()

    def changed(self) -> UserError:
        return UserError(f"{self.where} was changed while it was read.", "Start again.")


def parsed(rows: Iterable[tuple[int, Any]]) -> NumberedRows:
    """The rows, those of lines parsed. Raises UnicodeDecodeError."""
    return ((number, parse_line(given) if isinstance(given, bytes) else given) for number, given in rows)


def file_source(path: Path) -> RowSource:
    """The rows of a file. Raises UserError for a kind that is not read; a file without an ending holds JSONL."""
    kind = path.suffix.lower()
    if kind and kind not in SUFFIXES and path.exists():
        raise UserError(
            f"--data {path}: files ending in {path.suffix} are not read.",
            f"Give one of {', '.join(SUFFIXES)}; unpack an archive first.",
        )
    read = {".parquet": _parquet, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _paragraphs}.get(kind, _lines)
    unit = "row" if kind in (".parquet", ".json") else "line"
    return RowSource(str(path), path.name, unit, lambda: read(path), kind, (path,) if path.is_file() else ())


def parse_line(line: bytes) -> Any:
    """The JSON of a line, or its Fault. Raises UnicodeDecodeError."""
    text = line.decode()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        return Fault(f"is not JSON{where}")


def _lines(path: Path) -> NumberedRows:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            text = (line if number > 1 else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\n")
            if text.strip():
                yield number, text


def _json(path: Path) -> NumberedRows:
    """The rows of a list, or of an object that holds one; else of JSON lines under a wrong name."""
    with _opened(path) as file:
        head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from enumerate(_elements(path), 1)
        return
    first, _, others = head.partition(b"\n")
    if others.strip() and not isinstance(_parsed(path, first), Fault):
        yield from _lines(path)
        return
    content = _whole(path)
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if isinstance(content, dict) and any(isinstance(content.get(name), list) for name in ("messages", "conversations")):
        lists = [[content]]  # a single row
    if len(lists) != 1:
        raise UserError(f"{path} holds {len(lists)} lists of rows, and should hold one.", "Write the rows as a list.")
    yield from enumerate(lists[0], 1)


def _parsed(path: Path, line: bytes) -> Any:
    try:
        return parse_line(line)
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def _elements(path: Path) -> Iterator[Any]:
    """The elements of the list that the file holds. What is no list to its end is an error after its elements."""
    try:
        with _opened(path) as file:
            yield from JsonList(codecs.getreader("utf-8-sig")(file)).elements()
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except NotJson:
        _whole(path)  # it knows line and column
        raise UserError(f"{path} is not JSON.", "Correct the file.") from None


def _whole(path: Path) -> Any:
    with _opened(path) as file:
        raw = file.read()
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (ValueError, RecursionError) as error:
        at = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON{at}: {error}", "Correct the file.") from None


def _csv(path: Path) -> NumberedRows:
    """The rows by Python's own reader: text stays text (`007`, `NA`), and lines can be named."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    header: list[str] = []
    with _text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        while True:
            line = reader.line_num + 1  # where the row begins: texts may contain line breaks
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path} line {line}: {error}", "Correct the file; quotes inside a text are doubled."
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if not header:
                header = _checked_header(path, cells)
            elif len(cells) != len(header):
                yield line, Fault(f"has {len(cells)} columns, its header {len(header)}")
            else:
                yield line, dict(zip(header, cells, strict=True))


def _checked_header(path: Path, header: list[str]) -> list[str]:
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}: two columns are named {twice[0]!r}.", "Rename one of them.")
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{path}: its columns are separated by semicolons.", "Save it with commas, or as .tsv.")
    return header


def _paragraphs(path: Path) -> NumberedRows:
    """The paragraphs of plain text, separated by empty lines."""
    part: list[str] = []
    with _text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\n").removesuffix("\r")
            if text.strip(" \t"):
                part.append(text)
            elif part:
                yield number - len(part), {"text": "\n".join(part)}
                part = []
    if part:
        yield number - len(part) + 1, {"text": "\n".join(part)}


def _parquet(path: Path) -> NumberedRows:
    from pyarrow.parquet import ParquetFile

    number = 0
    with closing(_arrow(path, ParquetFile, path)) as file:
        batches = _arrow(path, file.iter_batches, _PARQUET_ROWS)
        while (batch := _arrow(path, next, batches, None)) is not None:
            for row in _arrow(path, batch.to_pylist):
                number += 1
                yield number, without_none(row)


def _arrow(path: Path, call: Callable[..., Any], *given: Any) -> Any:
    """What `call` gives. Raises UserError where the file is damaged, or is none."""
    try:
        return call(*given)
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file.", "Check the path.") from None
    except Exception as error:  # its own, the system's, memory for sizes that the file only claims, no UTF-8 in a text
        raise UserError(
            f"{path} cannot be read as Parquet: {first_line(error)}", "Fetch or write the file again."
        ) from None


def without_none(value: Any) -> Any:
    """`value` without keys that hold None: Arrow gives every struct the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(
            f"--data {path}: no such file or folder.",
            "Give a file, a folder with a train file in it, or a hub data set (owner/name).",
        ) from None
    except OSError as error:
        raise UserError(
            f"--data {path}: cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from None


@contextmanager
def _text(path: Path, newline: str) -> Iterator[IO[str]]:
    """The file as text. Raises UserError where it is not UTF-8."""
    try:
        with _opened(path), path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def not_utf8(path: Path) -> UserError:
    """The error of a file whose text is not UTF-8, with the first place that is not."""
    at, line = 0, 0
    with _opened(path) as file:
        guess = _guess_encoding(file.read(_HEAD))
        file.seek(0)
        for raw in file:
            line += 1
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                at += error.start
                break
            at += len(raw)
    return UserError(
        f"{path} is not UTF-8 text (line {line}, byte {at}){f'; it looks like {guess}' if guess else ''}.",
        f"Convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {path.name} > utf8.jsonl",
    )


def _guess_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    for codec, name in (("euc_jp", "EUC-JP"), ("cp932", "SHIFT_JIS"), ("gb18030", "GB18030")):
        decoder = codecs.getincrementaldecoder(codec)()
        try:
            text = decoder.decode(raw)  # its last character may be cut
        except UnicodeDecodeError:
            continue
        # nearly every byte string decodes in these: only kana make it likely
        if any("\u3040" <= letter <= "\u30ff" for letter in text):
            return name
    return None

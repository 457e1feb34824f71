"""The rows of a file, read by its ending, one after another: no more of it is in memory than must be."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from common.data.arrow_rows import parquet_rows
from common.data.json_list import JsonList, NotJson
from common.data.messages import Fault
from common.data.row_source import HEAD, NumberedRows, Position, RowSource, json_fault, not_utf8, opened, parse_line
from common.errors import UserError, first_line
from common.paths import SUFFIXES


def file_source(path: Path) -> RowSource:
    """The rows of a file. Raises UserError for a kind that is not read; a file without an ending holds JSONL."""
    kind = path.suffix.lower()
    if kind and kind not in SUFFIXES and path.exists():
        raise UserError(
            f"--data {path}: files ending in {path.suffix} are not read.",
            f"Give one of {', '.join(SUFFIXES)}; unpack an archive first.",
        )
    read = {".parquet": parquet_rows, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _paragraphs}.get(kind, _lines)
    unit = "row" if kind in (".parquet", ".json") else "line"
    return RowSource(str(path), path.name, unit, partial(read, path), kind, (path,) if path.is_file() else ())


def _lines(path: Path, position: Position) -> NumberedRows:
    with opened(path, position) as file:
        yield from _lines_of(file)


def _lines_of(file: IO[bytes]) -> NumberedRows:
    for number, line in enumerate(file, 1):
        text = (line if number > 1 else line.removeprefix(codecs.BOM_UTF8)).rstrip(b"\n")
        if text.strip():
            yield number, text


def _json(path: Path, position: Position) -> NumberedRows:
    """The rows of a list, or of an object that holds one; else of JSON lines under a wrong name."""
    with opened(path, position) as file:
        head = file.peek(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        if head.startswith(b"["):
            yield from enumerate(_elements(path, file), 1)
            return
        first, _, others = head.partition(b"\n")
        if not others and len(head) > HEAD // 2 and file.seekable():  # a first row of its own length, or one long line
            first, others = file.readline(), file.read(1)
            file.seek(0)
        if others.strip() and not isinstance(_parsed(path, first), Fault):
            yield from _lines_of(file)
            return
        content = _whole(path, file)
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


def _elements(path: Path, file: io.BufferedReader) -> Iterator[Any]:
    """The elements of the list that the file holds. What is no list to its end is an error after its elements."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        yield from JsonList(text).elements()
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except NotJson:
        text.detach()
        if file.seekable():
            file.seek(0)
            _whole(path, file)  # it knows line and column
        raise UserError(f"{path} is not JSON.", "Correct the file.") from None


def _whole(path: Path, file: io.BufferedReader) -> Any:
    try:
        return json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (ValueError, RecursionError) as error:
        at, why = "", first_line(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = f" (line {error.lineno}, column {error.colno})", json_fault(error)
        raise UserError(f"{path} is not JSON{at}: {why}", "Correct the file.") from None


def _csv(path: Path, position: Position) -> NumberedRows:
    """The rows by Python's own reader: text stays text (`007`, `NA`), and lines can be named."""
    csv.field_size_limit(1 << 24)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    header: list[str] = []
    with _text(path, "", position) as file:
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
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise UserError(
                f"{path}: its columns are separated by {name}.", "Save it with commas, or with tabs as .tsv."
            )
    return header


def _paragraphs(path: Path, position: Position) -> NumberedRows:
    """The paragraphs of plain text, separated by empty lines."""
    part: list[str] = []
    with _text(path, "\n", position) as file:
        for number, line in enumerate(file, 1):
            text = line.rstrip("\n").removesuffix("\r")
            if text.strip(" \t"):
                part.append(text)
            elif part:
                yield number - len(part), {"text": "\n".join(part)}
                part = []
    if part:
        yield number - len(part) + 1, {"text": "\n".join(part)}


@contextmanager
def _text(path: Path, newline: str, position: Position) -> Iterator[IO[str]]:
    """The file as text. Raises UserError where it is not UTF-8."""
    try:
        with opened(path, position) as file:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except UnicodeDecodeError:
        raise not_utf8(path) from None

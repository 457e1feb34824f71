"""The rows of a file, read by its ending, each with its place in the file."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.messages import Fault
from common.errors import UserError, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Each row, or its Fault, with its place as a message names it and as an Example's source does.
LocatedRows = Iterator[tuple[str, str, Any]]


def read_file(path: Path) -> LocatedRows:
    """The rows of a file. Raises UserError where it cannot be read at all; a file without an ending holds JSONL."""
    kind = path.suffix.lower()
    if kind and kind not in SUFFIXES and path.exists():
        raise UserError(
            f"--data {path}: files ending in {path.suffix} are not read.",
            f"Give one of {', '.join(SUFFIXES)}; unpack an archive first.",
        )
    read = {".parquet": _parquet, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _paragraphs}
    return read.get(kind, _lines)(path)


def _lines(path: Path) -> LocatedRows:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name} line {number}", f"{path.name}:{number}", _json_line(line)


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        return Fault(f"is not JSON{where}")


def _json(path: Path) -> LocatedRows:
    """The rows of a list, or of an object that holds one; else of JSON lines under a wrong name."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and not isinstance(_json_line(lines[0]), Fault):
            yield from _lines(path)
            return
        at = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON{at}: {error}", "Correct the file.") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if isinstance(content, dict) and any(isinstance(content.get(name), list) for name in ("messages", "conversations")):
        lists = [[content]]  # a single row
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise UserError(f"{path} holds {len(lists)} lists of rows, and should hold one.", "Write the rows as a list.")
    for number, row in enumerate(lists[0], 1):
        yield f"{path.name} row {number}", f"{path.name}:{number}", row


def _csv(path: Path) -> LocatedRows:
    """The rows by Python's own reader: text stays text (`007`, `NA`), and lines can be named."""
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
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
            header = cells
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}: two columns are named {twice[0]!r}.", "Rename one of them.")
            if len(header) == 1 and ";" in header[0]:
                raise UserError(f"{path}: its columns are separated by semicolons.", "Save it with commas, or as .tsv.")
        elif len(cells) != len(header):
            yield f"{path.name} line {line}", "", Fault(f"has {len(cells)} columns, its header {len(header)}")
        else:
            yield f"{path.name} line {line}", f"{path.name}:{line}", dict(zip(header, cells, strict=True))


def _paragraphs(path: Path) -> LocatedRows:
    """The paragraphs of plain text, separated by empty lines."""
    number, text = 1, _read_text(path).replace("\r\n", "\n")
    for part in re.split(r"((?:\n[ \t]*)+\n)", text):
        if part.strip():
            yield f"{path.name} line {number}", f"{path.name}:{number}", {"text": part.strip("\n")}
        number += part.count("\n")


def _parquet(path: Path) -> LocatedRows:
    import pyarrow
    import pyarrow.parquet

    def damaged(error: Exception) -> UserError:
        return UserError(f"{path} cannot be read as Parquet: {first_line(error)}", "Fetch or write the file again.")

    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file.", "Check the path.") from None
    except Exception as error:  # its own errors, the system's, and memory for sizes that the file only claims
        raise damaged(error) from None
    try:
        rows = table.to_pylist()
    except Exception as error:  # a text that is not UTF-8
        raise damaged(error) from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", f"{path.name}:{number}", without_none(row)


def without_none(value: Any) -> Any:
    """`value` without keys that hold None: Arrow gives every struct the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"--data {path}: no such file or folder.",
            "Give a file, a folder with a train file in it, or a hub data set (owner/name).",
        ) from None
    except OSError as error:
        raise UserError(
            f"--data {path}: cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(raw)
        raise UserError(
            f"{path} is not UTF-8 text (line {line}, byte {error.start}){f'; it looks like {guess}' if guess else ''}.",
            f"Convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {path.name} > utf8.jsonl",
        ) from None


def _guess_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    for codec, name in (("euc_jp", "EUC-JP"), ("cp932", "SHIFT_JIS"), ("gb18030", "GB18030")):
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError:
            continue
        # nearly every byte string decodes in these: only kana make it likely
        if any("\u3040" <= letter <= "\u30ff" for letter in text):
            return name
    return None

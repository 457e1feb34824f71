"""What gives rows: a file, or a split of a data set on the hub."""

import codecs
import io
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common.data.messages import Fault
from common.errors import UserError

# Each row with its number. As bytes: the JSON text of a line, still to be parsed. Else the row, or its Fault.
NumberedRows = Iterator[tuple[int, Any]]
NOT_JSON = "is not JSON"  # begins the Fault of a line
HEAD = 1 << 20  # bytes by which the layout of a JSON file, or a foreign encoding, is recognized


class Position:
    """How far a source is read."""

    share: Callable[[], float] = staticmethod(lambda: 0.0)  # of the file, or of the rows, in 0..1


@dataclass(frozen=True)
class RowSource:
    """The rows of one file, or of one split of a data set on the hub."""

    where: str  # as messages name it
    name: str  # before the number of a row in the source of an Example
    unit: str  # what is counted: line or row
    read: Callable[[Position], NumberedRows]  # raises UserError where it cannot be read
    kind: str  # how the files are read, and which rows of theirs
    files: tuple[Path, ...]  # that hold the rows; none where these can be read only once

    def place(self, number: int) -> str:
        """`train.jsonl line 17`."""
        return f"{self.name} {self.unit} {number}"

    def rows(self) -> NumberedRows:
        return self.read(Position())

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


def parse_line(line: bytes) -> Any:
    """The JSON of a line, or its Fault. Raises UnicodeDecodeError."""
    text = line.decode()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {json_fault(error)}" if isinstance(error, json.JSONDecodeError) else ""
        return Fault(f"{NOT_JSON}{where}")


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong. A comma behind the last element has no name of its own before Python 3.13."""
    before = error.doc[: error.pos + 1].rstrip().rstrip("}]").rstrip()
    return f"{error.msg}{' (a comma behind the last one)' if before.endswith(',') else ''}"


@contextmanager
def opened(path: Path, position: Position) -> Iterator["io.BufferedReader[Any]"]:
    try:
        with io.BufferedReader(path.open("rb", buffering=0), HEAD) as file:
            if size := path.is_file() and os.fstat(file.fileno()).st_size:
                position.share = lambda: os.lseek(file.fileno(), 0, os.SEEK_CUR) / size
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
    finally:
        position.share = lambda: 1.0


def not_utf8(path: Path) -> UserError:
    """The error of a file whose text is not UTF-8, with the first place that is not."""
    if not path.is_file():  # a pipe, which can be read once
        return UserError(f"{path} is not UTF-8 text.", "Convert it with iconv.")
    at, line = 0, 0
    with opened(path, Position()) as file:
        guess = _guess_encoding(file.read(HEAD))
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
        f"Convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}",
    )


def _guess_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    for codec, name in (("euc_jp", "EUC-JP"), ("cp932", "CP932"), ("gb18030", "GB18030")):
        decoder = codecs.getincrementaldecoder(codec)()
        try:
            text = decoder.decode(raw)  # its last character may be cut
        except UnicodeDecodeError:
            continue
        # nearly every byte string decodes in these: only kana make it likely
        if any("\u3040" <= letter <= "\u30ff" for letter in text):
            return name
    return None

"""What a model has answered, each as soon as it is there: a stopped evaluation continues, and no answer is lost."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from common.documents import parse_json
from common.errors import UserError
from common.files import errors_naming
from common.system.cache import try_lock


def key_of(*asked: Any) -> str:
    """Of all that an answer depends on."""
    text = json.dumps(asked, ensure_ascii=False).encode(errors="surrogatepass")  # a path may be no UTF-8
    return hashlib.sha256(text).hexdigest()[:32]


class AnswerFile:
    """A file of lines, each a JSON object with the `key` of what was asked; lines are only added."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._found: dict[str, dict[str, Any]] = {}
        file.seek(0)
        *lines, torn = file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            self._read(line, number)
        with errors_naming(path):
            file.truncate(file.tell() - len(torn))  # of a killed process

    def _read(self, line: bytes, number: int) -> None:
        try:
            content = parse_json(line, allow_nan=True)
            self._found[str(content.pop("key"))] = content
        except (ValueError, KeyError) as error:
            what = "has no key." if isinstance(error, KeyError) else f"is {error}"
            raise UserError(f"{self.path} line {number} {what}", "Remove the file, or give another --out.") from None

    def get(self, key: str) -> dict[str, Any] | None:
        return self._found.get(key)

    def add(self, key: str, content: dict[str, Any]) -> None:
        self._found[key] = content
        with errors_naming(self.path):
            self._file.write(json.dumps({"key": key, **content}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


@contextmanager
def answer_file(path: Path) -> Iterator[AnswerFile]:
    """The file, made where there is none. Raises UserError where another process has it, or a line is damaged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not try_lock(file.fileno()):
            raise UserError(f"Another process is writing {path}.", "Wait for it, or give another --out.")
        yield AnswerFile(path, file)

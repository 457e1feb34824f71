"""What the header of a GGUF file says of its tensors."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

# Bytes of a metadata value by its type code; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ARRAYS = 4  # within one another; llama.cpp reads one
_NAME = 4096  # bytes; llama.cpp's own limit is 64


def damaged(gguf: Path) -> UserError:
    return UserError(f"{gguf} is not a complete GGUF file.", "Delete it and export again.")


@dataclass(frozen=True)
class _Fields:
    """A GGUF's fields, read in their order. Raises UserError where the file ends before."""

    gguf: Path
    file: BinaryIO
    size: int

    def number(self, form: str) -> int:
        read = self.file.read(struct.calcsize(form))
        if len(read) < struct.calcsize(form):
            raise damaged(self.gguf)
        return int(struct.unpack("<" + form, read)[0])

    def skip(self, kind: int, count: int, within: int = 0) -> None:
        """Pass over `count` metadata values of a type."""
        if kind == 8:
            for _ in range(count):
                self._jump(self.number("Q"))
        elif kind == 9 and within < _ARRAYS:
            for _ in range(count):
                self.skip(self.number("I"), self.number("Q"), within + 1)
        elif kind in _SIZES:
            self._jump(_SIZES[kind] * count)
        else:
            raise damaged(self.gguf)

    def text(self) -> str:
        """A string, such as a tensor's name."""
        if (size := self.number("Q")) > _NAME:
            raise damaged(self.gguf)
        return self.file.read(size).decode("utf-8", "replace")

    def _jump(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise damaged(self.gguf)
        self.file.seek(count, os.SEEK_CUR)


@dataclass(frozen=True)
class GgufTensor:
    """shape: row length first. code: of its type."""

    name: str
    shape: tuple[int, ...]
    code: int


def read_tensors(gguf: Path) -> list[GgufTensor]:
    """The tensors in the file's order. Raises UserError where it is no complete GGUF.

    Why not gguf-py's reader: it makes an object of each piece of the vocabulary, and takes 25 s for 262,144 of them.
    Here they are skipped. Source: ggml/docs/gguf.md, versions 2 and 3.
    """
    with gguf.open("rb") as file:
        fields = _Fields(gguf, file, gguf.stat().st_size)
        if file.read(4) != b"GGUF" or fields.number("I") not in (2, 3):
            raise damaged(gguf)
        tensors, pairs = fields.number("Q"), fields.number("Q")
        for _ in range(pairs):
            fields.skip(8, 1)
            fields.skip(fields.number("I"), 1)
        found = []
        for _ in range(tensors):
            name = fields.text()
            if not (shape := tuple(fields.number("Q") for _ in range(fields.number("I")))):
                raise damaged(gguf)
            found.append(GgufTensor(name, shape, fields.number("I")))
            fields.number("Q")  # the offset of its data
        return found

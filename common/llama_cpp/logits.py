"""Logits out of a GGUF, token by token, by llama.cpp itself: a client for `common/llama_cpp/logits_tool/logits.cpp`."""

import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, cast

import numpy as np

from common.errors import UserError

_REMEDY = "Close other programs where memory is short; see whether llama.cpp runs the file: python cli.py serve RUN"


class GgufLogits:
    """One GGUF held open in a process of its own; a context manager. Raises UserError with the tool's last words.

    context: tokens that the longest row has. `vocabulary` is the GGUF's.
    """

    def __init__(self, tool: Path, gguf: Path, context: int) -> None:
        self.tool, self.gguf, self.context = tool, gguf, context
        self.vocabulary = 0

    def __enter__(self) -> "GgufLogits":
        import psutil

        threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        self._errors = tempfile.TemporaryFile("w+")
        command = [str(self.tool), str(self.gguf), str(self.context), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
        )
        try:
            self.vocabulary = int(np.frombuffer(self._read(4), np.int32)[0])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [P, vocabulary] float32 after the tokens at `positions` [P], increasing, of the row `ids` [T]."""
        counts = np.array([len(ids), len(positions)], np.int32)
        request = b"".join(np.asarray(part, np.int32).tobytes() for part in (counts, ids, positions))
        try:
            cast(IO[bytes], self._process.stdin).write(request)
        except OSError:
            raise self._dead() from None
        return np.frombuffer(self._read(4 * len(positions) * self.vocabulary), np.float32).reshape(len(positions), -1)

    def _read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = cast(IO[bytes], self._process.stdout).read(min(missing, 1 << 24))
            if not part:
                raise self._dead()
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _dead(self) -> UserError:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()[-10:]
        return UserError(f"llama.cpp gave no logits of {self.gguf}:\n" + "\n".join(lines), _REMEDY)

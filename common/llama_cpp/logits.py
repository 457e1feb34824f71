"""Logits from a GGUF, token by token, by llama.cpp itself: a client for `common/llama_cpp/logits_tool/logits.cpp`.

Why a tool of our own: llama-server gives probabilities of the tokens it generates, not of those in a given row.
llama-perplexity writes its logits in 16 bits, and for one long text in place of rows.
"""

import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from common.errors import Unable, UserError
from common.llama_cpp.install import OF_ANOTHER_CPU, llama_environment
from common.system.hardware import physical_cores
from common.system.process import failed_by_machine, of_another_cpu, running

_REMEDY = "Close other programs where memory is short; see whether llama.cpp runs the file: python cli.py serve RUN"


class GgufLogits:
    """One GGUF kept open in a process of its own; a context manager. Raises UserError with the tool's last lines.

    context: tokens of the longest row. vocabulary: tokens of the GGUF's vocabulary, known once it is open. seconds:
    until the model must be loaded, and until a row must be answered.
    """

    def __init__(self, tool: Path, gguf: Path, context: int, seconds: float = 600) -> None:
        self.tool, self.gguf, self.context, self.seconds = tool, gguf, context, seconds
        self.vocabulary = 0
        self._stack = ExitStack()

    def __enter__(self) -> "GgufLogits":
        command = [str(self.tool), str(self.gguf), str(self.context), str(physical_cores())]
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            pipe = subprocess.PIPE
            options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": self._errors, "bufsize": 0}
            options["env"] = llama_environment()  # no token
            self._process = stack.enter_context(running(command, **options))
            self.vocabulary = int(np.frombuffer(self._exchange(b"", 4), np.int32)[0])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [P, vocabulary] float32 after the tokens at `positions` [P] (increasing) of the row `ids` [T]."""
        counts = np.array([len(ids), len(positions)], np.int32)
        request = b"".join(np.asarray(part, np.int32).tobytes() for part in (counts, ids, positions))
        answer = self._exchange(request, 4 * len(positions) * self.vocabulary)
        return np.frombuffer(answer, np.float32).reshape(len(positions), -1)

    def _exchange(self, request: bytes, size: int) -> bytearray:
        """The `size` bytes that the tool answers; it is ended where they do not come in time."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.terminate()

        timer = threading.Timer(self.seconds, give_up)
        timer.start()
        try:
            rest = memoryview(request)
            while rest:  # one write may take a part only
                rest = rest[cast(IO[bytes], self._process.stdin).write(rest) :]
            answer = bytearray()
            while len(answer) < size:
                part = cast(IO[bytes], self._process.stdout).read(min(size - len(answer), 1 << 24))
                if not part:
                    raise self._dead(late)
                answer += part
        except OSError:
            raise self._dead(late) from None
        finally:
            timer.cancel()
        return answer

    def _dead(self, late: threading.Event) -> UserError:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()[-10:]
        when = f" within {self.seconds:g} s" if late.is_set() else ""
        status = self._process.returncode
        kind = Unable if late.is_set() or failed_by_machine(status, lines) else UserError
        text = f"llama.cpp returned no logits for {self.gguf}{when}:\n" + "\n".join(lines)
        return kind(text, OF_ANOTHER_CPU if of_another_cpu(status) else _REMEDY)

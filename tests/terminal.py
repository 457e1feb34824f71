"""A command in a real pseudo terminal, as a user sits before it: what it writes is waited for, and keys are sent."""

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

from tests import ROOT

ENTER, DOWN, ERASE, END = "\r", "\x1b[B", "\x15", "\x04"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>78])")


class Terminal:
    """`python cli.py ARGV` in `folder`. environment: over this process's own."""

    def __init__(self, folder: Path, environment: dict[str, str], *argv: str) -> None:
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.chdir(folder)
            kept = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200"} | environment
            os.execve(sys.executable, [sys.executable, str(ROOT / "cli.py"), *argv], kept)
        self.seen, self._at = "", 0

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until `text` is written, after what was waited for before."""
        end = time.monotonic() + seconds
        while (found := self.seen.find(text, self._at)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.seen[self._at :]}"
            assert self._read(1), f"{text!r} did not come before the end:\n{self.seen[self._at :]}"
        self._at = found + len(text)

    def send(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def status(self, seconds: float = 60) -> int:
        """The exit status, at its end."""
        end = time.monotonic() + seconds
        while self._read(1):
            assert time.monotonic() < end, f"it does not end:\n{self.seen[self._at :]}"
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def kill(self) -> None:
        try:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.terminal)

    def _read(self, seconds: float) -> bool:
        """Whether the terminal is still open."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return True
        try:
            new = os.read(self.terminal, 1 << 16)
        except OSError:  # Linux: the child has closed its side
            return False
        self.seen += _ESCAPES.sub("", new.decode("utf-8", "replace"))
        return bool(new)

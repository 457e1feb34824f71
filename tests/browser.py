"""A page in a headless Chromium that stays open: asked by its debugging protocol, through two pipes and no port."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

# What the page's console is told, what a script of it raises, and what the browser complains of beside.
_COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
_SECONDS = 30  # that an answer may take


def program() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "Chromium is missing: apt-get install -y --no-install-recommends chromium fonts-noto-cjk"
    return found


class Page:
    """`address`, opened. profile: an empty folder. console: what was complained of so far."""

    def __init__(self, address: str, profile: Path) -> None:
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        settings = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        )
        # Chromium reads its descriptor 3 and writes 4.
        start = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program(), *settings]
        self._browser = subprocess.Popen(start, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.console: list[str] = []
        self._number, self._session, self._read = 0, "", b""
        target = self._tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Runtime", "Log", "Page"):
            self._tell(f"{part}.enable")
        self._tell("Page.navigate", url=address)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, value: Any, seconds: float = 20) -> None:
        """Until the expression has the value."""
        end = time.monotonic() + seconds
        while (found := self.ask(expression)) != value:
            assert time.monotonic() < end, f"{expression} is {found!r}, not {value!r}; console: {self.console}"
            time.sleep(0.2)

    def close(self) -> None:
        self._browser.kill()
        self._browser.wait()
        os.close(self._in)
        os.close(self._out)

    def _tell(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params} | session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _SECONDS
        while True:
            assert time.monotonic() < end, f"no answer to {method}"
            found = self._next()
            if found.get("method") in _COMPLAINTS:
                self.console.append(json.dumps(found["params"]))
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return dict(found["result"])

    def _next(self) -> Any:
        while b"\0" not in self._read:
            new = os.read(self._in, 1 << 16)
            assert new, f"Chromium has ended: {self._browser.wait()}"
            self._read += new
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of those that Chromium is given."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]

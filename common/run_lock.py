"""One process at a time writes into a run folder: two that train, export or verify it would mix their files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

LOCK = ".lock"  # it stays in the folder: whoever removed it would let a third process lock another file of that name


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder. Raises UserError where another process holds it; the system lets go when that one ends."""
    from filelock import FileLock, Timeout

    if (run / LOCK).is_symlink():
        raise UserError(f"{run / LOCK} is a link.", "Remove it.")
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained, exported or verified by another process.", "Wait for it, or stop it first."
        ) from None
    try:
        yield
    finally:
        lock.release()

"""Who may write into a run folder: one process at a time, and only inside of it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files import sweep

LOCK = ".lock"  # it stays in the folder: whoever removed it would let a third process lock another file of that name


def refuse_links(run: Path) -> None:
    """Raises UserError where something in the run folder is a link that leads out of it.

    A run may be a stranger's: what is written there, under a name that is known beforehand, must not land elsewhere.
    """
    inside, links = run.resolve(), [path for path in sorted(run.rglob("*")) if path.is_symlink()]
    targets = {path: Path(os.path.realpath(path)) for path in links}  # unlike resolve, it takes a link to itself
    if strays := {path: target for path, target in targets.items() if not target.is_relative_to(inside)}:
        shown = ", ".join(f"{path.relative_to(run)} to {target}" for path, target in strays.items())
        raise UserError(
            f"{run}: links in it lead out of the folder: {shown}.",
            "Remove them; where you trust one, replace it by the file itself.",
        )


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder, without what killed processes left in it.

    The system releases the lock when the process ends, however it ends. Raises UserError where another process holds
    it, and as refuse_links.
    """
    from filelock import FileLock, Timeout

    refuse_links(run)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained, exported or verified by another process.", "Wait for it, or stop it first."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        fix = "Give an --output on another file system, or mount this one with locks."
        raise UserError(f"{run}: its file system cannot lock files ({error.strerror}).", fix) from None
    try:
        sweep(run, LOCK)
        yield
    finally:
        lock.release()

"""Free space, looked at before anything large is written, and waited for where a result would be lost."""

import errno
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from common.errors import UserError

_Written = TypeVar("_Written")
_AGAIN, _PATIENCE = 10.0, 3600.0  # seconds


def require_disk(writes: Iterable[tuple[Path, str, int]], fix: str) -> None:
    """Raises UserError where a disk has less free than will be written there; writes: folder, what, bytes."""
    disks: dict[int, tuple[Path, list[tuple[str, int]]]] = {}
    for folder, what, size in writes:
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        disks.setdefault(_device(existing), (existing, []))[1].append((what, size))
    for existing, parts in disks.values():
        free, needed = shutil.disk_usage(existing).free, sum(size for _, size in parts)
        if free < needed:
            shown = ", ".join(f"{what} {size / 1e9:.1f}" for what, size in parts)
            raise UserError(
                f"{existing} has {free / 1e9:.1f} GB free, and this run will write up to {needed / 1e9:.1f} GB "
                f"({shown}).",
                fix,
            )


def once_there_is_room(write: Callable[[], _Written], what: str, warn: Callable[[str], None]) -> _Written:
    """What `write` returns. While the disk is full it is called again every ten seconds, for an hour at most.

    what: would be lost. Raises OSError for any other fault, and for a disk that stays full.
    """
    ends, told = time.monotonic() + _PATIENCE, False
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() >= ends:
                raise
            if not told:
                warn(
                    f"{error.strerror}: {error.filename or 'no file is named'}. {what} is in memory only. Free space "
                    f"on that disk: for an hour it is tried again every {_AGAIN:.0f} seconds (Ctrl-C gives up)"
                )
            told = True
        time.sleep(_AGAIN)


def _device(path: Path) -> int:
    return path.stat().st_dev

"""A disk that is full when a file is to be made durable."""

import errno
from pathlib import Path


def full_disk(path: Path) -> None:
    """In place of common.files._sync."""
    raise OSError(errno.ENOSPC, "No space left on device")

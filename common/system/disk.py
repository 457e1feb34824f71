"""Free space, looked at before anything large is written."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError


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


def _device(path: Path) -> int:
    return path.stat().st_dev

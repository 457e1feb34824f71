"""What a container or a batch job may take: limits of this process's control groups (Linux, version 1 and 2)."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc/self")


class Limit(NamedTuple):
    """The smallest limit that holds for this process, and the file that states it."""

    amount: float
    file: Path


def memory_limit() -> Limit | None:
    """Bytes that this process and the others of its groups may take together; None where nothing limits them."""
    return min(_memory_limits(), default=None)


def memory_left() -> int | None:
    """Bytes that are left below the limits; files in the page cache count as left. None where there is no limit."""
    left = [limit.amount - _used(limit.file.parent) for limit in _memory_limits()]
    return max(0, int(min(left))) if left else None


def core_limit() -> Limit | None:
    """Cores' worth of time that this process's groups may take; None where nothing limits them."""
    return min(_core_limits(), default=None)


def _memory_limits() -> Iterator[Limit]:
    for folder in _groups("memory", PROC):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(folder / name).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                yield Limit(int(text), folder / name)


_UNLIMITED = 2**60  # version 1 writes a number near 2^63 where there is no limit


def _used(folder: Path) -> int:
    """What the group holds without files in the page cache, which the kernel takes back at need."""
    text = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or "0"
    parts = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
    prefix = "total_" if "total_inactive_file" in parts else ""  # version 1: with the groups below
    files = sum(int(parts.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return int(text) - files


def _core_limits() -> Iterator[Limit]:
    for folder in _groups("cpu", PROC):
        for name, text in (
            ("cpu.max", _read(folder / "cpu.max")),
            ("cpu.cfs_quota_us", f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"),
        ):
            quota, _, period = text.strip().partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit():  # not `max`, not -1
                yield Limit(int(quota) / int(period), folder / name)


@cache
def _groups(controller: str, proc: Path) -> list[Path]:
    """The folders of this process's groups for `controller`: its own, and each above it up to the mounted root.

    A container often sees its own group as the root, or a path that is not mounted for it: then the root is all.
    """
    found = []
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            for root, mount in _mounts(proc, controller if controllers else ""):
                shown = Path(path).is_relative_to(root) and ".." not in path
                own = mount / Path(path).relative_to(root) if shown else mount
                found += [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)]
    return found


def _mounts(proc: Path, controller: str) -> Iterator[tuple[str, Path]]:
    """`(root, mount point)` of each hierarchy of version 1 with `controller`, or of version 2 for none."""
    for line in _read(proc / "mountinfo").splitlines():
        own, _, of_filesystem = line.partition(" - ")
        fields, (kind, _, options) = own.split(), of_filesystem.split(" ", 2)
        if (kind == "cgroup" and controller in options.split(",")) or (kind == "cgroup2" and not controller):
            yield fields[3], Path(fields[4])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""

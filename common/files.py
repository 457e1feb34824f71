"""Files and folders that appear under their name complete, or not at all."""

import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A temporary name is prefix, host, process, random digits, final name. Of another host no process can be asked.
_PREFIX, _REPLACED = ".twintune-", ".twintune-old-"
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LEFT = re.compile(rf"{re.escape(_PREFIX)}(old-)?{_HOST}-(\d+)-[0-9a-f]+-(.+)", re.DOTALL)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix; what is written there gets the name `path` at the end.

    On an error `path` stays as it was, and nothing is left beside it.
    """
    _clean(path.parent)
    temporary = _beside(path, _PREFIX)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which replaces `path` at the end.

    On an error `path` stays as it was, and nothing is left beside it. Where a process was killed between the two
    renames, the next write in that parent folder gives the earlier folder its name back.
    """
    _clean(path.parent)
    temporary, old = _beside(path, _PREFIX), _beside(path, _REPLACED)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            _sync(inner)
        _sync(temporary)
        if path.exists():  # moved first: to remove a large folder takes time, and a kill would leave a part of it
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _settle(old, path)


def _beside(path: Path, prefix: str) -> Path:
    """A name that nobody else uses, on the same disk."""
    # the suffix stays: some tools choose the format by it
    return path.with_name(f"{prefix}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _clean(parent: Path) -> None:
    """Remove what this host's killed processes left in `parent`; a replaced folder whose successor is missing returns.

    Other hosts may share the folder: their files stay.
    """
    for left in parent.glob(f"{_PREFIX}*"):
        found = _LEFT.fullmatch(left.name)
        if found is None or _runs(int(found[2])):
            continue
        if found[1]:
            _settle(left, parent / found[3])
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _settle(old: Path, path: Path) -> None:
    """Remove the folder that was replaced; or give it its name `path` back, where nothing took that."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync(path: Path) -> None:
    """Have the system write the file's, or the folder's, contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

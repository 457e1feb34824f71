"""Files and folders that appear under their name complete, or not at all."""

import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A temporary name is prefix, host, process, random digits, final name, which is cut where it would be too long. Of
# another host no process can be asked, nor of a container with its own process numbers.
_PREFIX, _REPLACED = ".twintune-", ".twintune-old-"
_LONGEST = 255  # bytes of a name that file systems take
_NUMBERS = Path("/proc/self/ns/pid")
_HOST = hashlib.sha256(
    f"{platform.node()} {os.readlink(_NUMBERS) if _NUMBERS.is_symlink() else ''}".encode()
).hexdigest()[:8]
_LEFT = re.compile(rf"{re.escape(_PREFIX)}(old-)?([0-9a-f]{{8}})-(\d+)-[0-9a-f]+-(.+)", re.DOTALL)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, of the same suffix; what is written there gets the name `path` at the end.

    On an error `path` stays as it was, and nothing is left beside it.
    """
    _clean(path.parent)
    temporary = _beside(path, _PREFIX)
    try:
        with errors_naming(path, temporary):
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
    try:
        with errors_naming(path, temporary):
            temporary.mkdir(parents=True)
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


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder in `parent`, else where the system keeps temporary files; it is removed at the end.

    What a killed process left in `parent` is removed first.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    parent.mkdir(parents=True, exist_ok=True)
    _clean(parent)
    folder = _beside(parent / "scratch", _PREFIX)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def errors_naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Within it an OSError names the file that is written: `path`, in place of none or of what is in `temporary`.

    A write to an open file fails without a name, a copy or a rename with two.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(_named(error, path, temporary)), None
        raise


def _named(error: OSError, path: Path, temporary: Path | None) -> object:
    name = error.filename2 or error.filename
    if not isinstance(name, (str, os.PathLike)):  # none, or the number of an open file
        return path
    if temporary is not None and Path(name).is_relative_to(temporary):
        return path / Path(name).relative_to(temporary)
    return name


def tree_bytes(folder: Path) -> int:
    """What the files in the folder take; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path, lock: str) -> None:
    """Remove what killed processes left anywhere in `folder`, but not in folders in it that have a `lock` of their own.

    The caller holds it: what is left by other hosts goes too, and by an earlier process of this one's number, because
    a container's is always the same. What a living process of this host is writing stays.
    """
    lefts = list(folder.glob("checkpoints/step-*.tmp"))  # version 0.1's
    for place, folders, names in os.walk(folder):
        if Path(place) != folder and lock in names:
            folders.clear()
            continue
        lefts += [Path(place, name) for name in (*folders, *names) if _abandoned(name)]
        folders[:] = [name for name in folders if not _LEFT.fullmatch(name)]
    for left in lefts:
        _remove(left)


def _abandoned(name: str) -> bool:
    """Whether it is a temporary name, and not one of another living process of this host."""
    found = _LEFT.fullmatch(name)
    return found is not None and not (found[2] == _HOST and int(found[3]) != os.getpid() and _runs(int(found[3])))


def _beside(path: Path, prefix: str) -> Path:
    """A name that nobody else uses, on the same disk."""
    start = f"{prefix}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}-"
    return path.with_name(start + _cut(path.name, _LONGEST - len(start)))


def _cut(name: str, most: int) -> str:
    """The name in at most so many bytes. Its suffix stays, unless that is most of it: some tools choose by it."""
    if len(os.fsencode(name)) <= most:
        return name
    suffix = os.fsencode(Path(name).suffix)
    suffix = suffix if len(suffix) <= most // 2 else b""
    stem = os.fsencode(name)[: most - len(suffix)].decode(errors="ignore")  # no half of a letter
    return stem + os.fsdecode(suffix)


def _clean(parent: Path) -> None:
    """Remove what this user's killed processes left in `parent`; a replaced folder whose successor is missing returns.

    Other hosts and users may share the folder: their files stay.
    """
    for left in parent.glob(f"{_PREFIX}*"):
        found = _LEFT.fullmatch(left.name)
        if found and found[2] == _HOST and not _runs(int(found[3])) and _own(left):
            _remove(left)


def _remove(left: Path) -> None:
    """Remove a temporary file or folder; a replaced folder whose successor is missing gets its name back."""
    found = _LEFT.fullmatch(left.name)
    if found and found[1]:
        _settle(left, left.with_name(found[4]))
    elif left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _settle(old: Path, path: Path) -> None:
    """Remove the folder that was replaced; or give it its name `path` back, where nothing took that."""
    if old.exists() and not path.exists():
        with suppress(FileNotFoundError):  # another process has just done it
            old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:  # another process has just removed it
        return False


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

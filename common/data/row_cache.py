"""Where what was read and encoded of large data is kept: by contents, so that every command finds it again."""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Progress
from common.data.array_folder import read_arrays, write_arrays
from common.data.row_source import RowSource
from common.errors import UserError, os_fault
from common.files import scratch_folder
from common.system.cache import artifact_lock, cache_folder, try_lock

Kept = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays and a record, which is JSON
_KEPT = 20 << 30  # bytes; the folders that were not used for the longest time go first
_LIBRARIES = ("jinja2", "pyarrow", "tokenizers", "transformers")  # what else decides how a row is read and encoded
_READ = 1 << 24


@contextmanager
def cached_folder(source: RowSource, settings: Any, progress: Progress) -> Iterator[Path]:
    """The folder for what is made of the source with these settings, which are JSON.

    One process at a time has it, and the others wait. Raises UserError where a file cannot be read.
    """
    rows, refused = _rows_folder(cache_folder())

    def say(text: str) -> None:
        progress(0.0, text)

    try:
        contents = _contents(source, progress)
        key = json.dumps([source.name, source.kind, contents, settings, _code()], sort_keys=True)
        folder = rows / hashlib.sha256(key.encode()).hexdigest()[:32]
        with ExitStack() as stack:
            if not refused:
                stack.enter_context(artifact_lock(folder, say, every=1, what=f"the rows of {source.where}"))
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)  # it was used now
            _make_room(folder)
            yield folder
    except OSError as error:
        raise _refused(error) from None


def _refused(error: OSError) -> UserError:
    kept = "" if cache_refused() else ": the rows that were done are kept"
    return os_fault(error, f"start again{kept}.")


def cache_refused() -> str:
    """Why rows cannot be kept for the next command; empty where they can."""
    return _rows_folder(cache_folder())[1]


@cache
def _rows_folder(caches: Path) -> tuple[Path, str]:
    """`(the folder in the cache, "")`; where it cannot be used, one that ends with this process, and why."""
    folder = caches / "rows"
    try:
        for used in (folder, caches / "locks"):
            used.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=used) as file:
                try_lock(file.fileno())
    except OSError as error:
        stack = ExitStack()
        atexit.register(stack.close)
        return stack.enter_context(scratch_folder()), f"{error.strerror}: {error.filename or folder}"
    return folder, ""


def keep(folder: Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> Kept:
    """The same, read from `folder`, where they are written. Raises UserError where the disk refuses them."""
    try:
        write_arrays(folder, arrays, record)
    except OSError as error:
        raise _refused(error) from None
    kept = read_arrays(folder)
    if kept is None:
        raise UserError(f"{folder}: what was just written there reads otherwise.", "Check that disk.")
    return kept


_HASHES: dict[Any, str] = {}  # by files and stamps


def _contents(source: RowSource, progress: Progress) -> str:
    """SHA-256 over the files' contents; they are read again where their stamps are others."""
    key = source.files, tuple(source.stamps)
    if key not in _HASHES:
        digest, done = hashlib.sha256(), 0
        for path in source.files:
            own = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(_READ):
                    own.update(piece)
                    done += len(piece)
                    progress(min(1.0, done / source.size), f"hash {path.name}")
            digest.update(own.digest())
        _HASHES[key] = digest.hexdigest()
    return _HASHES[key]


@cache
def _code() -> str:
    """SHA-256 over the code that reads and encodes."""
    digest = hashlib.sha256(json.dumps([version(name) for name in _LIBRARIES]).encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), folder.with_name("model_files.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make_room(used: Path) -> None:
    """Remove what was not used for the longest time, beyond what is kept; never the folder that is used."""
    left = _KEPT
    with suppress(FileNotFoundError):  # another process has just removed it
        others = [folder for folder in used.parent.iterdir() if folder != used]
        for folder in sorted(others, key=lambda folder: -folder.stat().st_mtime):
            left -= sum(file.stat().st_size for file in folder.rglob("*"))
            if left < 0:
                shutil.rmtree(folder, ignore_errors=True)

"""Where what was read and encoded of large data is kept: by contents, so that every command finds it again."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.data.array_folder import read_arrays, write_arrays
from common.data.readers import RowSource
from common.errors import UserError, os_fault
from common.system.cache import cache_folder

_KEPT = 20 << 30  # bytes; the folders that were not used for the longest time go first
_LIBRARIES = ("jinja2", "pyarrow", "tokenizers", "transformers")  # what else decides how a row is read and encoded


def cached_folder(source: RowSource, settings: Any) -> Path:
    """The folder for what is made of the source with these settings, which are JSON.

    Raises UserError where a file cannot be read, or the folder not be made.
    """
    try:
        contents = _contents(source.files, tuple(source.stamps))
        key = json.dumps([source.name, source.kind, contents, settings, _code()], sort_keys=True)
        folder = cache_folder() / "rows" / hashlib.sha256(key.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # it was used now
    except OSError as error:
        raise os_fault(error, "start again. The cache folder is that of XDG_CACHE_HOME, where it is set.") from None
    _make_room(folder)
    return folder


def keep(folder: Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    """The same, read from `folder`, where they are written. Raises UserError where the disk refuses them."""
    try:
        write_arrays(folder, arrays, record)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was quicker with the same rows
            raise os_fault(error, "start again: the rows that were done are kept there.") from None
    kept = read_arrays(folder)
    if kept is None:
        raise UserError(f"{folder}: what was just written there reads otherwise.", "Check that disk.")
    return kept


@lru_cache(maxsize=8)
def _contents(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    """SHA-256 over the files' contents; they are read again where their stamps are others."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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

"""A folder of arrays with a record beside them, written in one step and checked when it is read."""

import errno
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from common.documents import read_json
from common.errors import UserError
from common.files import atomic_folder

_RECORD = "record.json"
_MAPPED = {"ids", "weights"}  # arrays that are as long as all tokens
_READ = 1 << 22


def write_arrays(folder: Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """`folder` with the arrays and the record, in one step. Raises OSError."""
    with atomic_folder(folder) as temporary:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        checks = {name: _check(temporary / f"{name}.npy") for name in arrays}
        kept = {"arrays": checks, "record": record}
        (temporary / _RECORD).write_text(json.dumps(kept | {"check": _check_of(kept)}), encoding="utf-8")


def read_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays and the record; None where the folder is missing, cut off or altered.

    The largest two are mapped into memory. A mapping keeps a file open, and macOS lets a process have 256.
    """
    try:
        kept = read_json(folder / _RECORD, "")
        if not isinstance(kept, dict) or kept.pop("check", None) != _check_of(kept):
            return None
        checks, record = kept["arrays"], kept["record"]
        if any(_check(folder / f"{name}.npy") != check for name, check in checks.items()):
            return None
        paths = {name: folder / f"{name}.npy" for name in checks}
        arrays = {
            name: np.asarray(np.load(path, mmap_mode="r") if name in _MAPPED else np.load(path))
            for name, path in paths.items()
        }
        return arrays, record
    except (OSError, UserError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return None


def _check_of(kept: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(kept).encode())


def _check(path: Path) -> int:
    """CRC-32 of the file's bytes. They are read, not mapped: mapped pages count as this process's memory."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_READ):
            found = zlib.crc32(piece, found)
    return found

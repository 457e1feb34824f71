"""Hashes of large models, remembered: to read the weights again takes seconds to a minute at every start."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from common.documents import read_json
from common.errors import UserError
from common.files import atomic_write
from common.system.cache import cache_folder

LEAST = 100_000_000  # bytes of a model whose hash is remembered; smaller ones are read in no time
# Seconds since the last change: another change within one tick of a file system's clock would not show.
_SETTLED = 2.0

Stamps = list[list[str | int]]  # of each file: name, bytes, times of change of contents and of inode


def stamps(files: list[Path]) -> Stamps:
    """What shows that a file has changed, without reading it."""
    found = ((path.name, path.stat()) for path in files)
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found]


def remembered(folder: Path, now: Stamps, version: int) -> str | None:
    """The hash that the folder had when its files had these stamps; None where that is not known.

    version: of the way it is computed.
    """
    try:
        known = read_json(_file(folder), "")
    except (FileNotFoundError, UserError):
        return None
    found, same = known.get("hash"), (known.get("files"), known.get("version")) == (now, version)
    return found if same and isinstance(found, str) and len(found) == 64 else None


def remember(folder: Path, before: Stamps, version: int, found: str) -> None:
    """Keep the hash. before: the files' stamps when reading began. Without room for it nothing is kept."""
    newest = max(int(time_ns) for stamp in before for time_ns in stamp[2:])
    if sum(int(stamp[1]) for stamp in before) < LEAST or time.time() - newest / 1e9 < _SETTLED:
        return
    with suppress(OSError):
        path = _file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            known = {"folder": str(folder.resolve()), "files": before, "version": version, "hash": found}
            temporary.write_text(json.dumps(known))


def _file(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / "model-hashes" / f"{name}.json"

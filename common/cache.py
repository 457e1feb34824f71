"""Where Twintune keeps what it fetched or made once."""

from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("twintune")


def cache_lock() -> Any:
    """A context manager: one process at a time makes things in the cache; the others wait and find them made."""
    from filelock import FileLock

    cache_folder().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_folder() / "lock")

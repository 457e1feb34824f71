"""Paths as users type them."""

import os
from pathlib import Path

from common.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")  # of the files of rows that are read
_NAME_BYTES, _PATH_BYTES = 255, 4_000  # what every file system takes


def path_fault(text: str) -> str:
    """Why no file can be at `text`, or nothing."""
    try:
        path = os.fsencode(Path(text).expanduser())
    except UnicodeEncodeError:
        return "it holds half a letter"
    except RuntimeError:
        return f"there is no user {text[1:].partition('/')[0]!r}"
    if b"\0" in path:
        return "it holds a zero byte"
    if len(path) > _PATH_BYTES or max(map(len, path.split(b"/"))) > _NAME_BYTES:
        return "it is too long"
    return ""


def user_path(text: str, option: str) -> Path:
    """`text` as a path, `~` and `~name` replaced. Raises UserError naming `option` where no file can be there."""
    if fault := path_fault(text):
        raise UserError(f"{option} {text[:80]!r} is not a path: {fault}.", "Check the path.")
    return Path(text).expanduser()


def shown_path(text: str) -> str:
    """A path below the current folder, relative to it; any other text as it is."""
    path, here = Path(text), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else text


def source_name(source: str | None) -> str:
    """What a model or data set is called in names of runs and files: its path, ending and revision left out."""
    name = Path(source or "").name
    return name.removesuffix(".gguf").removesuffix(".jsonl").partition(":")[0].partition("@")[0]


def sources_name(sources: list[str]) -> str:
    """What the data is called in names of runs: the first source, and the second, or how many more."""
    names = [source_name(source) for source in sources]
    return "-".join(names if len(names) < 3 else [names[0], f"and-{len(names) - 1}-more"])

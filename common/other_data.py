"""`datasets` of Axolotl and TRL as sources for --data, and a line for whatever of them cannot be said there."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config_values import short
from common.paths import SUFFIXES, path_fault

_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of the library `datasets`: the rows are those of data_files
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OF_HUB = ("name", "revision", "split")
_SHARDS = ("shards", "shards_idx")
_NEEDLESS = ("path", "type", "ds_type", "data_files", "preprocess_shards", "trust_remote_code")
_COLUMNS = re.compile(r"field.*|message_(property_mappings|field_role|field_content)")


@dataclass
class Rows:
    """sources: for --data. kinds: their types in Axolotl's file. left: a line for what is not said by them."""

    sources: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def rows_of(datasets: Any, folder: Path) -> Rows:
    """What `datasets` names; folder: of the file, from which a path may be meant."""
    rows = Rows()
    for number, entry in enumerate(datasets if isinstance(datasets, list) else [datasets], 1):
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and path and not path_fault(path):
            _read({str(key): value for key, value in entry.items()}, folder, rows)
        else:
            rows.left.append(f"datasets, entry {number}: it has no path, so it is not read; add its rows under data")
    return rows


def _read(entry: dict[str, Any], folder: Path, rows: Rows) -> None:
    path = entry["path"]
    given = {key for key, value in entry.items() if value not in (None, False, "")}
    local = Path(path).suffix in SUFFIXES or any(map(os.path.exists, (path, folder / path)))
    files = entry.get("data_files")
    files = [files] if isinstance(files, str) else files
    if path in _BUILDERS or (local and "data_files" in given):
        if not files or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            rows.left.append(f"datasets {path}: data_files names no files; add them under data")
            return
        _add([_seen_from_here(file, folder) for file in files], entry, rows)
    elif local or "." in path or ("/" in path and not _HUB_NAME.fullmatch(path)):
        _add([_seen_from_here(path, folder)], entry, rows)
    elif "/" not in path:
        rows.left.append(f"datasets {short(path)}: no such file here, and a set on the hub is named owner/name")
    else:
        _add(_of_hub(entry), entry, rows)
        given -= set(_OF_HUB)
        if "data_files" in given:
            rows.left.append(
                f"datasets {path}: data_files: here all its files are read; or download those, and give them"
            )
    _list_others(short(path), entry, given, rows)


def _seen_from_here(file: str, folder: Path) -> str:
    """The path of a file that lies beside the configuration alone."""
    return str(folder / file) if not os.path.exists(file) and os.path.exists(folder / file) else file


def _add(sources: list[str], entry: dict[str, Any], rows: Rows) -> None:
    for source in sources:
        file = source.partition("#")[0]
        if "://" in source:
            rows.left.append(f"datasets {short(source)}: not read from there; download it, and add the file under data")
        elif set("*?[") & set(file):
            rows.left.append(f"datasets {short(source)}: a pattern of names; add each file under data")
        elif Path(file).suffix in (".arrow", ".gz", ".zip", ".zst"):
            rows.left.append(f"datasets {short(source)}: such files are not read; write the rows as JSONL or Parquet")
        elif source in rows.sources:
            rows.left.append(f"datasets {short(source)}: named again; once here, and weights count its rows more often")
        else:
            rows.sources.append(source)
            rows.kinds += [entry["type"]] if isinstance(entry.get("type"), str) else []


def _of_hub(entry: dict[str, Any]) -> list[str]:
    """`owner/name:config@revision#split`, one for each configuration that is named."""
    names = entry.get("name")
    parts = "".join(f"{mark}{entry[key]}" for mark, key in (("@", "revision"), ("#", "split")) if entry.get(key))
    return [
        f"{entry['path']}{f':{name}' if name else ''}{parts}"
        for name in (names if isinstance(names, list) else [names])
    ]


def _list_others(path: str, entry: dict[str, Any], given: set[str], rows: Rows) -> None:
    """A line for each kind of key that the sources do not say."""
    if "split" in given and entry["split"] != "train":
        rows.left.append(
            f"datasets {path}: split {short(entry['split'])}: a file is read whole; give one with those rows"
        )
    for key in sorted({"name", "revision"} & given):
        rows.left.append(
            f"datasets {path}: {key} {short(entry[key])}: files have none; name the file itself under data"
        )
    if set(_SHARDS) & given:
        parts = ", ".join(f"{key} {short(entry[key])}" for key in _SHARDS if key in given)
        rows.left.append(f"datasets {path}: {parts}: all rows are read here; give a file with that part of them")
    others = sorted(given - {*_OF_HUB, *_SHARDS, *_NEEDLESS})
    columns = [key for key in others if _COLUMNS.fullmatch(key)]
    if columns:
        rows.left.append(f"datasets {path}: {', '.join(columns)}; name columns by field")
    if isinstance(entry.get("type"), dict):
        rows.left.append(
            f"datasets {path}: type: a format of its own; write the rows as messages, or name columns by field"
        )
    if rest := [key for key in others if key not in columns]:
        rows.left.append(f"datasets {path}: {', '.join(rest)}: not known here; look whether it matters")

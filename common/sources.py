"""Where rows come from: JSONL, JSON, CSV, Parquet and text files, a folder of them, or a data set of the hub."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.data import Data, Example, prompt_key
from common.errors import UserError
from common.formats import KNOWN, NAMES, Fault, read_row

SHOWN_FAULTS = 10
FORM = 'each line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
Places = Iterator[tuple[str, str, Any]]  # where for a message, where for a row's source, the row


def load_data(source: str, valid_share: float, seed: int, fields: dict[str, str] | None = None) -> Data:
    """Read a file (holding out `valid_share` of its rows), a folder with train and maybe valid and test files, or a
    data set of the hub (`owner/name`, `owner/name:config@revision`). A path that exists comes first.

    `fields`: {part of a shape: the column it is called here}. The hold-out is drawn by seed; rows with the same prompt
    stay on one side. Raises UserError naming every faulty row.
    """
    path, fields, shapes = Path(source).expanduser(), fields or {}, Counter[str]()
    if path.is_dir():
        found = {part: _file_of(path, names) for part, names in _PARTS.items()}
        if found["train"] is None:
            raise UserError(
                f"--data {path}: there is no train file in this folder (train{', train'.join(SUFFIXES)}).",
                "Name the training file train.jsonl (valid.jsonl and test.jsonl beside it are optional), "
                "or give one file.",
            )
        parts = {part: read_rows(file, fields, shapes) if file else [] for part, file in found.items()}
        return Data(parts["train"], parts["valid"], parts["test"], dict(shapes))
    if not path.exists() and (hub := _HUB_NAME.fullmatch(source)) and path.suffix not in SUFFIXES:
        parts = {
            part: _examples(_hub_rows(rows, part), f"{source} ({part})", "row(s)", fields, shapes)
            for part, rows in _from_hub(source, **hub.groupdict()).items()
        }
        if parts.get("valid"):
            return Data(parts["train"], parts["valid"], parts.get("test", []), dict(shapes))
        train, valid = _hold_out(parts["train"], valid_share, seed)
        return Data(train, valid, parts.get("test", []), dict(shapes))
    train, valid = _hold_out(read_rows(path, fields, shapes), valid_share, seed)
    return Data(train, valid, [], dict(shapes))


def _file_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise UserError(
            f"--data {folder}: both {found[0].name} and {found[1].name} are there.", "Take one of them away."
        )
    return found[0] if found else None


def _hold_out(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, valid)`. Rows of one prompt go together: a prompt seen in training would flatter the validation."""
    count = min(len(rows) - 1, max(1, round(len(rows) * share))) if share else 0
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(number)
    chosen: set[int] = set()
    for number in np.random.default_rng([seed, 1]).permutation(len(rows)).tolist():
        group = groups[prompt_key(rows[number])]
        if len(chosen) < count and number not in chosen and len(chosen) + len(group) < len(rows):
            chosen.update(group)
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def read_rows(path: Path, fields: dict[str, str] | None = None, shapes: Counter[str] | None = None) -> list[Example]:
    """Every row of a file, by its ending. Raises UserError naming the file and up to ten faulty lines or rows."""
    read = {".parquet": _parquet, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _paragraphs}
    unit = "row(s)" if path.suffix in (".parquet", ".json") else "line(s)"
    places = read.get(path.suffix, _lines)(path)
    return _examples(places, str(path), unit, fields or {}, Counter() if shapes is None else shapes)


def _examples(places: Places, where: str, unit: str, fields: dict[str, str], shapes: Counter[str]) -> list[Example]:
    rows, faults, columns = [], [], dict[str, None]()
    for place, source, row in places:
        if isinstance(row, dict):
            columns |= dict.fromkeys(map(str, row))
        try:
            if isinstance(row, Fault):
                raise row
            shape, example = read_row(row, source, fields)
        except Fault as fault:
            faults.append(f"{place}: {fault}")
            continue
        shapes[shape] += 1
        rows.append(example)
    if missing := [f"{part}={column}" for part, column in fields.items() if column not in columns and columns]:
        raise UserError(
            f"--field {' '.join(missing)}: {where} has no such column.", f"Its columns: {', '.join(columns)}."
        )
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = faults[:SHOWN_FAULTS] + ([f"... and {more} more"] if more > 0 else [])
        raise UserError(
            f"{where} has {len(faults)} bad {unit}:\n" + "\n".join(shown),
            f"Correct them; {FORM}\n       Also read: {KNOWN}. Columns called otherwise: --field PART=COLUMN.",
        )
    if not rows:
        raise UserError(f"{where} is empty: it holds no rows.", f"Put rows in it; {FORM}")
    return rows


def check_fields(fields: dict[str, str]) -> str | None:
    """What is wrong with --field, if anything."""
    unknown = [part for part in fields if part not in NAMES]
    return f"{unknown[0]!r} is no part of a row; known: {', '.join(NAMES)}" if unknown else None


def _lines(path: Path) -> Places:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name} line {number}", f"{path.name}:{number}", _json_line(line)


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        return Fault(f"is not JSON{where}")


def _json(path: Path) -> Places:
    """A list of rows, or an object that holds one; else lines of JSON under a wrong name."""
    text = _read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and not isinstance(_json_line(lines[0]), Fault):
            yield from _lines(path)
            return
        at = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON{at}: {error}", "Correct the file.") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if isinstance(content, dict) and any(isinstance(content.get(name), list) for name in ("messages", "conversations")):
        lists = [[content]]  # a single row
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise UserError(f"{path} holds {len(lists)} lists of rows, and should hold one.", "Write the rows as a list.")
    for number, row in enumerate(lists[0], 1):
        yield f"{path.name} row {number}", f"{path.name}:{number}", row


def _csv(path: Path) -> Places:
    """Python's own reader: text stays text (`007`, `NA`), and lines can be named."""
    reader = csv.DictReader(
        io.StringIO(_read_text(path)), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    csv.field_size_limit(1 << 30)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}", "Correct the file.") from None
        if row is None:
            return
        place = f"{path.name} line {reader.line_num}"
        if None in row or None in row.values():
            yield place, "", Fault(f"has not the header's {len(reader.fieldnames or [])} columns")
        else:
            yield place, f"{path.name}:{reader.line_num}", {key: value for key, value in row.items() if value != ""}


def _paragraphs(path: Path) -> Places:
    """Plain text: rows are parted by empty lines."""
    number = 1
    for part in re.split(r"((?:\n[ \t]*)+\n)", _read_text(path)):
        if part.strip():
            yield f"{path.name} line {number}", f"{path.name}:{number}", {"text": part.strip("\n")}
        number += part.count("\n")


def _parquet(path: Path) -> Places:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file.", "Check the path.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}", "Fetch or write the file anew.") from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", f"{path.name}:{number}", _without_none(row)


def _without_none(value: Any) -> Any:
    """Arrow gives every struct the keys of all of them."""
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def _from_hub(source: str, name: str, config: str | None, revision: str | None) -> dict[str, Any]:
    """The data set's train, valid and test splits, as far as it has them."""
    import datasets

    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the library lets through its own errors, the hub's and the HTTP client's
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"--data {source}: no such file or folder, and the hub's data set cannot be loaded: {first}",
            "Check spelling and network; for a private one `hf auth login`. OWNER/NAME:CONFIG@REVISION chooses.",
        ) from None
    splits = {part: found[name] for part, names in _PARTS.items() for name in names if name in found}
    if "train" not in splits:
        if len(found) != 1:
            raise UserError(f"--data {source}: it has no train split, only {', '.join(found)}.", "Choose another.")
        splits = {"train": next(iter(found.values()))}
    return splits


def _hub_rows(rows: Any, part: str) -> Places:
    for number, row in enumerate(rows, 1):
        yield f"{part} row {number}", f"{part}:{number}", _without_none(row)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"--data {path}: no such file or folder.",
            "Give a file, a folder with a train file in it, or a hub data set (owner/name).",
        ) from None
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}.", "Check the path and its rights.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(raw)
        raise UserError(
            f"{path} is not UTF-8 text (line {line}, byte {error.start}){f'; it looks like {guess}' if guess else ''}.",
            f"Convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {path.name} > utf8.jsonl",
        ) from None


def _guess_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    for codec, name in (("euc_jp", "EUC-JP"), ("cp932", "SHIFT_JIS"), ("gb18030", "GB18030")):
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError:
            continue
        # nearly every byte string is something in these: believe it only where there is kana
        if any("\u3040" <= letter <= "\u30ff" for letter in text):
            return name
    return None

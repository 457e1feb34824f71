"""The rows of a file, of a folder of files, or of a data set on the hub."""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backend import Progress
from common.data.arrow_rows import hub_rows
from common.data.dataset import Counted, Dataset, Example
from common.data.facts import Facts, facts_of, take
from common.data.file_rows import Found, read_all, read_file
from common.data.formats import KNOWN, PARTS, clashing
from common.data.readers import file_source
from common.data.row_source import NOT_JSON, RowSource
from common.errors import UserError, first_line
from common.paths import SUFFIXES, user_path

SHOWN_FAULTS = 10
LARGE = 1 << 24  # bytes of a file from which on its rows are not held in memory
_PACKED = 4  # how much larger the texts of a Parquet file are
OnBadRow = Literal["error", "drop"]
FORM = 'each line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")
_HUB_FORM = "OWNER/NAME, OWNER/NAME:CONFIG@REVISION#SPLIT"


@dataclass
class _Reading:
    """How the files of a source are read, and what is found in them besides the rows."""

    fields: dict[str, str]
    on_bad_row: OnBadRow | None  # None: no option says so
    progress: Progress = lambda share, text: None
    prefix: str = ""  # before the sources of rows
    formats: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Counted[str]] = field(default_factory=dict)  # sources of rows not trained on, by kind
    bad: Counted[tuple[str, str]] = field(default_factory=Counted)  # rows that are dropped, each with its fault
    unread: dict[str, list[str]] = field(default_factory=dict)  # by file: columns that are not read

    def data(self, train: Sequence[Example], valid: Sequence[Example], test: Sequence[Example]) -> Dataset:
        return Dataset(train, valid, test, dict(self.formats), self.left_out, self.bad, self.unread)


def load_data(
    source: str,
    valid_share: float,
    seed: int,
    fields: dict[str, str] | None = None,
    on_bad_row: OnBadRow = "error",
    progress: Progress = lambda share, text: None,
    prefix: str = "",
) -> Dataset:
    """The rows of a file, of a folder with train and maybe valid and test files, or of a data set on the hub.

    A hub name is `owner/name` or `owner/name:config@revision#split`; a path that exists comes first. Without a
    validation file or split, `valid_share` of the training rows become one, drawn by `seed`; rows with the same prompt,
    or of one conversation, stay together. fields: {part of a format: its column here}. Rows in which nothing is trained
    are listed in `Dataset.left_out`. Faulty rows are listed in `Dataset.bad` with on_bad_row `drop`, else raise one
    UserError.
    prefix: stands before the source of each row.
    """
    path, reading = user_path(source, "--data"), _Reading(fields or {}, on_bad_row, progress, prefix)
    if path.is_dir():
        found = {part: _file_of(path, names) for part, names in _PARTS.items()}
        if found["train"] is None:
            raise UserError(
                f"--data {path}: there is no train file in this folder (train{', train'.join(SUFFIXES)}).",
                "Name the training file train.jsonl (valid.jsonl and test.jsonl beside it are optional), "
                "or give one file.",
            )
        parts = {part: _rows_of(file, reading) if file else [] for part, file in found.items()}
        return reading.data(parts["train"], parts["valid"], parts["test"])
    if not path.exists() and (hub := _HUB_NAME.fullmatch(source)) and path.suffix not in SUFFIXES:
        parts = {
            part: _examples(_hub_source(source, part, rows, prefix), reading)
            for part, rows in _from_hub(source, **hub.groupdict()).items()
        }
        train, valid = parts["train"], parts.get("valid", [])
        if not valid:
            train, valid = _split_validation(train, valid_share, seed)
        return reading.data(train, valid, parts.get("test", []))
    return reading.data(*_split_validation(_rows_of(path, reading), valid_share, seed), [])


def _file_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise UserError(f"--data {folder}: it holds both {found[0].name} and {found[1].name}.", "Remove one of them.")
    return found[0] if found else None


def _split_validation(rows: Sequence[Example], share: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """`(train, valid)`. What would lower the validation loss if it were trained on stays together, as of `_groups`."""
    count = min(len(rows) - 1, max(1, round(len(rows) * share))) if share else 0
    if not count:
        return rows, []
    _, group, sizes = np.unique(_groups(facts_of(rows), 2 * count), return_inverse=True, return_counts=True)
    order = group[np.random.default_rng([seed, 1]).permutation(len(rows))]
    shuffled = order[np.sort(np.unique(order, return_index=True)[1])]  # each group where its first row came
    fitting, left = [], count
    for number in shuffled.tolist():
        if not left:
            break
        if sizes[number] <= left:
            fitting.append(number)
            left -= int(sizes[number])
    if not fitting and len(sizes) > 1:  # every prompt has more rows than were asked for
        fitting = [shuffled[np.argmin(sizes[shuffled])]]
    chosen = np.isin(group, fitting)
    return take(rows, np.flatnonzero(~chosen)), take(rows, np.flatnonzero(chosen))


def _groups(facts: Facts, most: int) -> np.ndarray:
    """[N] by row the number of its group: rows with one prompt, and rows that continue another.

    By their prompts alone where all rows would be one group, or each group would have more than `most` rows.
    """
    _, prompt = np.unique(facts.prompts, return_inverse=True)
    contents, at = np.unique(facts.contents, return_index=True)
    place = np.minimum(np.searchsorted(contents, facts.beginnings), len(contents) - 1)
    longer, which = np.nonzero((contents[place] == facts.beginnings) & (facts.beginnings != facts.contents[:, None]))
    group = np.arange(prompt.max() + 1)  # by prompt a member of its group, its own number in one of them

    def first(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    for row, begun in zip(longer, at[place[longer, which]], strict=True):
        group[first(prompt[row])] = first(prompt[begun])
    found = np.array([first(number) for number in group])[prompt]
    sizes = np.unique(found, return_counts=True)[1]
    return found if len(sizes) > 1 and sizes.min() <= most else prompt


def read_rows(path: Path) -> Sequence[Example]:
    """Every row of a file, read by its ending. Raises UserError naming the file and up to ten faulty lines or rows."""
    return _rows_of(path, _Reading({}, None))


def _rows_of(path: Path, reading: _Reading) -> Sequence[Example]:
    source = file_source(path)
    return _examples(replace(source, name=f"{reading.prefix}{source.name}"), reading)


def _examples(source: RowSource, reading: _Reading) -> Sequence[Example]:
    rows: Sequence[Example]
    unpacked = source.size * (_PACKED if source.kind == ".parquet" else 1)
    if source.files and unpacked >= LARGE:
        rows, found = read_file(source, reading.fields, reading.progress)
    else:
        rows, found = read_all(source.parsed(), source.name, reading.fields)
    where, columns = source.where, found.columns
    if missing := [f"{part}={column}" for part, column in reading.fields.items() if column not in columns and columns]:
        raise UserError(
            f"--field {' '.join(missing)}: {where} has no such column.", f"Its columns: {', '.join(columns)}."
        )
    faults = Counted(len(found.faults), [(source.place(number), fault) for number, fault in found.faults.first])
    if faults and reading.on_bad_row != "drop":
        raise UserError(f"{where} has {len(faults)} bad {source.unit}(s):\n{_listed(faults)}", _remedy(reading, found))
    if not rows:
        raise _nothing_left(where, found.left_out, faults)
    for kind, numbers in found.left_out.items():
        sources = [f"{source.name}:{number}" for number in numbers.first]
        reading.left_out.setdefault(kind, Counted()).extend(Counted(len(numbers), sources))
    reading.formats += found.formats
    reading.bad.extend(faults)
    if found.unread:
        reading.unread[where] = list(found.unread)
    return rows


def _listed(faults: Counted[tuple[str, str]]) -> str:
    more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    return "\n".join([*(f"{place}: {fault}" for place, fault in faults.first[:SHOWN_FAULTS]), *more])


def _remedy(reading: _Reading, found: Found) -> str:
    """What to do about faulty rows."""
    if len(found.columns) == 2 and not found.numbers and not reading.fields:  # it is not the rows that are at fault
        prompt, completion = map(shlex.quote, found.columns)
        return (
            f"Say what its columns hold: --field prompt={prompt} completion={completion}, or the other way round. "
            f"Known without: {KNOWN}."
        )
    if not found.columns and all(fault.startswith(NOT_JSON) for _, fault in found.faults.first):  # no line is a row
        return (
            f"Write one row a line; {FORM}\n       A file that holds a list of rows is named .json; rows over several "
            "lines become lines by: jq -c . FILE > rows.jsonl"
        )
    drop = ", or leave such rows out: --on-bad-row drop" if reading.on_bad_row else ""
    known = f"Also read: {KNOWN}. Columns with other names: --field PART=COLUMN."
    return f"Correct them{drop}; {FORM}\n       {known}"


def _nothing_left(where: str, left_out: dict[str, Counted[int]], faults: Counted[tuple[str, str]]) -> UserError:
    """The error of a file in which no row can be trained on."""
    counts = [f"{len(numbers)} {kind}" for kind, numbers in left_out.items()]
    if faults:
        counts.append(f"{len(faults)} bad rows (--on-bad-row drop):\n{_listed(faults)}")
    if not counts:
        return UserError(f"{where} is empty: it holds no rows.", f"Put rows in it; {FORM}")
    why = ", ".join(counts) + ("" if faults else ".")
    return UserError(f"{where} holds nothing to train on: {why}", "Give rows with answers that are trained.")


def check_fields(fields: dict[str, str]) -> None:
    """Raises UserError where --field names no part, one part twice, or parts of two formats."""
    fault = clashing(fields)
    if unknown := [part for part in fields if part not in PARTS]:
        fault = f"{unknown[0]!r} is not a part of a row; known: {', '.join(PARTS)}"
    if fault:
        raise UserError(f"--field: {fault}.", "Write PART=COLUMN, as in --field instruction=question output=answer.")


def _from_hub(source: str, name: str, config: str | None, revision: str | None, split: str | None) -> dict[str, Any]:
    """The data set's train, valid and test splits, as far as it has them.

    No code of the data set is ever run: since its version 4 the library only reads data files.
    """
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each attempt; the last error is reported
    try:
        found = datasets.load_dataset(name, config, revision=revision, split=split)
    except Exception as error:  # the library lets through its own errors, the hub's and the HTTP client's
        raise UserError(
            f"--data {source}: no such file or folder, and the hub's data set cannot be loaded: {first_line(error)}",
            f"Check spelling and network; for a private one `hf auth login`. The form is {_HUB_FORM}.",
        ) from None
    if split:
        return {"train": found}
    splits = {part: found[name] for part, names in _PARTS.items() for name in names if name in found}
    if "train" not in splits:
        if len(found) != 1:
            raise UserError(
                f"--data {source}: it has no train split, only {', '.join(found)}.",
                f"Choose one: {source}#{next(iter(found))}",
            )
        splits = {"train": next(iter(found.values()))}
    return splits


def _hub_source(source: str, part: str, rows: Any, prefix: str) -> RowSource:
    files = tuple(Path(file["filename"]) for file in rows.cache_files)
    return RowSource(f"{source} ({part})", f"{prefix}{part}", "row", partial(hub_rows, rows), source, files)

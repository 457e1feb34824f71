"""The rows of a file, of a folder of files, or of a data set on the hub."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import Dataset, Example, data_hash, prompt_key
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.formats import KNOWN, PARTS, clashing, read_row
from common.data.messages import Fault, LeftOut
from common.data.readers import SUFFIXES, LocatedRows, read_file, without_none
from common.errors import UserError
from common.options import Options
from common.recipe import Recipe
from common.run_record import Run


def data_of(run: Run, options: Options) -> Dataset:
    """The run's data, read again. Raises UserError where it has changed since, or is gone."""
    without = "or do without it: --no-verify, no --imatrix."
    try:
        data = load_data(options.data or "", options.valid_share, options.seed, options.field)
    except UserError as error:
        raise UserError(error.what, f"Restore the data of {run}, {without}") from None
    if data_hash(data) != run.recipe.data_hash:
        raise UserError(f"{options.data} is not the data that {run} was trained on.", f"Restore that data, {without}")
    return data


def encoder_of(base: Path, options: Options, recipe: Recipe) -> Encoder:
    """As in training. `base` is the model's folder: its tokenizer is the one that training used."""
    return Encoder(load_tokenizer(base, options.chat_template), MaskingOptions(recipe.train_on, recipe.thinking))


SHOWN_FAULTS = 10
FORM = 'each line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")
_HUB_FORM = "OWNER/NAME, OWNER/NAME:CONFIG@REVISION#SPLIT"


@dataclass
class _Seen:
    """What reading found besides the rows, over all files of a source."""

    formats: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # sources of rows in which nothing is trained, by kind

    def data(self, train: list[Example], valid: list[Example], test: list[Example]) -> Dataset:
        return Dataset(train, valid, test, dict(self.formats), self.left_out)


def load_data(source: str, valid_share: float, seed: int, fields: dict[str, str] | None = None) -> Dataset:
    """The rows of a file, of a folder with train and maybe valid and test files, or of a data set on the hub.

    A hub name is `owner/name` or `owner/name:config@revision#split`; a path that exists comes first. Without a
    validation file or split, `valid_share` of the training rows become one, drawn by `seed`; rows with the same prompt
    stay together. fields: {part of a format: its column here}. Rows in which nothing is trained are listed
    in `Dataset.left_out`. Raises UserError naming every faulty row.
    """
    path, fields, seen = Path(source).expanduser(), fields or {}, _Seen()
    if path.is_dir():
        found = {part: _file_of(path, names) for part, names in _PARTS.items()}
        if found["train"] is None:
            raise UserError(
                f"--data {path}: there is no train file in this folder (train{', train'.join(SUFFIXES)}).",
                "Name the training file train.jsonl (valid.jsonl and test.jsonl beside it are optional), "
                "or give one file.",
            )
        parts = {part: _rows_of(file, fields, seen) if file else [] for part, file in found.items()}
        return seen.data(parts["train"], parts["valid"], parts["test"])
    if not path.exists() and (hub := _HUB_NAME.fullmatch(source)) and path.suffix not in SUFFIXES:
        parts = {
            part: _examples(_hub_rows(rows, part), f"{source} ({part})", "row(s)", fields, seen)
            for part, rows in _from_hub(source, **hub.groupdict()).items()
        }
        train, valid = parts["train"], parts.get("valid", [])
        if not valid:
            train, valid = _split_validation(train, valid_share, seed)
        return seen.data(train, valid, parts.get("test", []))
    return seen.data(*_split_validation(_rows_of(path, fields, seen), valid_share, seed), [])


def _file_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise UserError(f"--data {folder}: it holds both {found[0].name} and {found[1].name}.", "Remove one of them.")
    return found[0] if found else None


def _split_validation(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(train, valid)`. Rows with one prompt stay together: its answers in training would lower the validation loss."""
    count = min(len(rows) - 1, max(1, round(len(rows) * share))) if share else 0
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(number)
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    chosen: set[int] = set()
    for number in order:
        group = groups[prompt_key(rows[number])]
        if number not in chosen and len(chosen) + len(group) <= count:
            chosen.update(group)
    if count and not chosen and len(groups) > 1:  # every prompt has more rows than were asked for
        shuffled = [groups[prompt_key(rows[number])] for number in order]
        smallest = min(shuffled, key=len)
        chosen.update(smallest)
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def read_rows(path: Path) -> list[Example]:
    """Every row of a file, read by its ending. Raises UserError naming the file and up to ten faulty lines or rows."""
    return _rows_of(path, {}, _Seen())


def _rows_of(path: Path, fields: dict[str, str], seen: _Seen) -> list[Example]:
    unit = "row(s)" if path.suffix.lower() in (".parquet", ".json") else "line(s)"
    return _examples(read_file(path), str(path), unit, fields, seen)


def _examples(located: LocatedRows, where: str, unit: str, fields: dict[str, str], seen: _Seen) -> list[Example]:
    rows, faults, left_out, columns = [], [], dict[str, list[str]](), dict[str, None]()
    for place, source, row in located:
        if isinstance(row, dict):
            columns |= dict.fromkeys(map(str, row))
        try:
            if isinstance(row, Fault):
                raise row
            format, example = read_row(row, source, fields)
        except LeftOut as why:
            left_out.setdefault(why.kind, []).append(source)
            continue
        except Fault as fault:
            faults.append(f"{place}: {fault}")
            continue
        seen.formats[format] += 1
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
            f"Correct them; {FORM}\n       Also read: {KNOWN}. Columns with other names: --field PART=COLUMN.",
        )
    if not rows and left_out:
        counts = ", ".join(f"{len(sources)} {kind}" for kind, sources in left_out.items())
        raise UserError(f"{where} holds nothing to train on: {counts}.", "Give rows with answers that are trained.")
    if not rows:
        raise UserError(f"{where} is empty: it holds no rows.", f"Put rows in it; {FORM}")
    for kind, sources in left_out.items():
        seen.left_out.setdefault(kind, []).extend(sources)
    return rows


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
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--data {source}: no such file or folder, and the hub's data set cannot be loaded: {first}",
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


def _hub_rows(rows: Any, part: str) -> LocatedRows:
    """The split's rows, through Arrow: columns that nobody reads, such as pictures, are not decoded."""
    number = 0
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            number += 1
            yield f"{part} row {number}", f"{part}:{number}", without_none(row)

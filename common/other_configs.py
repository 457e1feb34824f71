"""Configurations of other programs: which program a file is for, and the keys that it sets. Nothing is executed."""

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config_values import short
from common.documents import YAML_BYTES, key_lines, parse_json, read_yaml
from common.errors import UserError
from common.other_scripts import CALLS, Unread, code_of, keyword_lines, settings_of
from common.other_trainings import ANOTHER_TRAINING, ONLY_SFT

# Keys by which a program's file is known; a key may be a mark of several.
MARKS: dict[str, set[str]] = {
    "mlx-lm": {
        "iters",
        "lora_parameters",
        "fine_tune_type",
        "num_layers",
        "steps_per_eval",
        "adapter_path",
        "lora_layers",
    },
    "axolotl": {
        "base_model",
        "datasets",
        "sequence_len",
        "micro_batch_size",
        "lora_target_linear",
        "lora_r",
        "num_epochs",
    },
    "llama-factory": {"stage", "finetuning_type", "template", "cutoff_len", "lora_target", "dataset", "lora_rank"},
    "trl": {"dataset_name", "use_peft", "lora_target_modules", "dtype", "max_length", "lora_r", "dataset_text_field"},
    "unsloth": {"model_name", "use_gradient_checkpointing", "random_state", "load_in_4bit", "loftq_config"},
}
TOOLS = tuple(MARKS)
_SCRIPTS = (".py", ".ipynb")
_CODE_BYTES = 1_000_000  # Python takes 10 s and more for larger ones
_FIX = "Give the file that the other program reads: YAML, JSON, or Unsloth's script or notebook."


def read_config(path: Path) -> tuple[dict[str, Any], Unread]:
    """`(the keys that the file sets, those whose values are not read)`. Raises UserError naming file and line."""
    try:
        if path.suffix in _SCRIPTS:
            return _script(path)
        if path.suffix == ".json":
            return parse_json(_text(path).encode()), []
        return {str(key): value for key, value in read_yaml(path, _FIX).items()}, []
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.", _FIX) from None
    except ValueError as error:
        raise UserError(f"{path} is {error}", _FIX) from None


def recognized(path: Path, values: dict[str, Any]) -> str:
    """The program by whose keys the file is written. Raises UserError where that is open."""
    found = best_fitting(path, values)
    if len(found) != 1:
        seen = f"its keys fit {' and '.join(found)} alike" if found else "none of its keys is one of theirs"
        raise UserError(f"{path} cannot be told from its keys: {seen}.", f"Name the program: --from {'|'.join(TOOLS)}.")
    return found[0]


def best_fitting(path: Path, keys: Collection[str]) -> list[str]:
    """The programs of which the file has most marks."""
    if path.suffix in _SCRIPTS:
        return ["unsloth"]
    hits = {tool: len(marks & {*keys}) for tool, marks in MARKS.items()}
    return [tool for tool, count in hits.items() if count and count == max(hits.values())]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(20 * YAML_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", _FIX) from None
    if len(content) > 20 * YAML_BYTES:
        raise UserError(f"{path} is larger than {20 * YAML_BYTES / 1e6:.0f} MB, too large for a configuration.", _FIX)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.", _FIX) from None


def where(path: Path, key: str) -> str:
    """The file with the line of a key that it sets, as far as that is known."""
    try:
        text = _text(path)
        found = key_lines(text) if path.suffix not in _SCRIPTS else keyword_lines(_tree(path))
    except (FileNotFoundError, ValueError):
        found = {}
    line = next((line for name, line in found.items() if name.replace("-", "_") == key), None)
    return f"{path}{_line(path, line)}"


def _line(path: Path, line: int | None) -> str:
    return f" line {line}{' of its code cells' if path.suffix == '.ipynb' else ''}" if line else ""


def _script(path: Path) -> tuple[dict[str, Any], Unread]:
    """The settings of the calls in a script or notebook, read as literals. Raises UserError for another training."""
    tree = _tree(path)
    values, left, other = settings_of(tree)
    if other is not None:
        raise UserError(f"{path}{_line(path, other[1])} calls {other[0]}: {ANOTHER_TRAINING}.", ONLY_SFT)
    if not values:
        raise UserError(f"{path} calls none of {', '.join(sorted(CALLS))} with settings.", _FIX)
    return values, left


def _tree(path: Path) -> ast.Module:
    code = _text(path)
    if path.suffix == ".ipynb":
        code = code_of(parse_json(code.encode()))
    if len(code.encode()) > _CODE_BYTES:
        raise UserError(f"{path} has more than {_CODE_BYTES / 1e6:.0f} MB of code, too much for settings.", _FIX)
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = _line(path, getattr(error, "lineno", None))
        raise UserError(f"{path}{line} is not Python: {getattr(error, 'msg', error)}", _FIX) from None


@dataclass
class NamedData:
    """What `dataset` means. sources: for --data. fields: of --field. left: a line for what is not said by them."""

    sources: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


_OF_HUB = ("subset", "split")
_PLACE = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "formatting"}
# By the name of a column in dataset_info.json the part of a row that it is here, and what is known without a word.
_PARTS = {
    "prompt": ("prompt", {"prompt", "instruction"}),
    "query": ("input", {"input"}),
    "response": ("completion", {"completion", "output", "response"}),
    "messages": ("messages", {"messages", "conversations"}),
    **{name: (name, {name}) for name in ("history", "system", "tools")},
}


def dataset_files(values: dict[str, Any], folder: Path) -> NamedData:
    """What LLaMA-Factory's `dataset` means, by the dataset_info.json in its `dataset_dir`; empty without one."""
    given = values.get("dataset")
    names = given if isinstance(given, list) else str(given or "").split(",")
    directory = Path(str(values.get("dataset_dir") or "data"))
    for place in (directory, folder / directory):
        try:
            info = json.loads(_text(place / "dataset_info.json"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, UserError):
            continue
        known = info if isinstance(info, dict) else {}
        entries = {str(name).strip(): known.get(str(name).strip()) for name in names}
        files = [_source(entry, place) for entry in entries.values() if isinstance(entry, dict)]
        if len(files) == len(names) and all(files):
            return _named(entries, files)
    return NamedData()


def _named(entries: dict[str, Any], sources: list[str]) -> NamedData:
    found = NamedData(sources)
    for name, entry in entries.items():
        said = {*_PLACE, *(_OF_HUB if "file_name" not in entry else ())}
        columns = entry.get("columns")
        if isinstance(columns, dict) and columns.keys() <= _PARTS.keys():
            columns = {part: str(column) for part, column in columns.items() if column}
            names = {"messages": "conversations"} if entry.get("formatting") == "sharegpt" else {}
            if columns.keys() == {"prompt"}:  # plain text
                names, columns = {"prompt": "text"}, {k: v for k, v in columns.items() if v != "text"}
            others = {part: column for part, column in columns.items() if column not in _PARTS[part][1]}
            if len(entries) == 1 or not others:
                found.fields |= {names.get(part, _PARTS[part][0]): column for part, column in others.items()}
                said.add("columns")
        for key, value in entry.items():
            if key not in said and value not in (None, False, ""):
                what = f"dataset {short(name)}, {short(str(key))} {short(value)}"
                found.left.append(f"{what}: not read; give such rows as a file under data, and their columns by field")
    return found


def _source(entry: dict[str, Any], place: Path) -> str:
    """The file of an entry of dataset_info.json, or its data set on the hub; empty where it has neither."""
    file = entry.get("file_name")
    if isinstance(file, str):
        return str(place / file) if (place / file).exists() else file
    name, subset, split = (str(entry.get(key) or "") for key in ("hf_hub_url", *_OF_HUB))
    return f"{name}{subset and f':{subset}'}{split and f'#{split}'}" if name else ""

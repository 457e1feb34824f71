"""Configurations of other programs: which program a file is for, and the keys that it sets. Nothing is executed."""

import ast
import json
import re
from pathlib import Path
from typing import Any

from common.documents import YAML_BYTES, parse_json, read_yaml
from common.errors import UserError, masked

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
# Calls whose keyword arguments are settings, by the last part of their names.
_CALLS = {
    "from_pretrained",
    "get_peft_model",
    "LoraConfig",
    "SFTConfig",
    "TrainingArguments",
    "UnslothTrainingArguments",
}
_TRAINER = "SFTTrainer"
# Their arguments by place, as far as they are settings.
_BY_PLACE = {
    "from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "get_peft_model": ("", "r", "target_modules", "lora_alpha", "lora_dropout"),
}
KEPT = "keys stay in the environment"
_TRAINER_KEYS = {"dataset_text_field", "max_seq_length", "packing"}  # the others are objects
RESPONSES_ONLY = "train_on_responses_only"  # Unsloth's function, and here a key: the script calls it
TRANSFORMERS = "TrainingArguments"  # likewise: the defaults are those of transformers, which Unsloth leaves alone
# A key whose value is a secret. A tokenizer's tokens are none.
_SECRET = re.compile(
    r"secret|passw|webhook|credential|(?:api|access|private)_?key"
    r"|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!image_)token$"
)
_REST = "**"  # stands for the keys in a `**` of a call
_CODE_BYTES = 1_000_000  # Python takes 10 s and more for larger ones
_FIX = "Give the file that the other program reads: YAML, JSON, or Unsloth's script or notebook."


Unread = list[tuple[str, str]]  # keys of a script that are no literals, each with a line about it


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
    if path.suffix in _SCRIPTS:
        return "unsloth"
    hits = {tool: len(marks & values.keys()) for tool, marks in MARKS.items()}
    best = max(hits.values())
    found = [tool for tool, count in hits.items() if count == best]
    if best == 0 or len(found) > 1:
        seen = f"its keys fit {' and '.join(found)} alike" if best else "none of its keys is one of theirs"
        raise UserError(f"{path} cannot be told from its keys: {seen}.", f"Name the program: --from {'|'.join(TOOLS)}.")
    return found[0]


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


def _script(path: Path) -> tuple[dict[str, Any], Unread]:
    """The settings of the calls in a script or notebook, read as literals."""
    code = _text(path)
    if path.suffix == ".ipynb":
        code = _cells(parse_json(code.encode()))
    if len(code.encode()) > _CODE_BYTES:
        raise UserError(f"{path} has more than {_CODE_BYTES / 1e6:.0f} MB of code, too much for settings.", _FIX)
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f" line {line}{' of its code cells' if path.suffix == '.ipynb' else ''}" if line else ""
        raise UserError(f"{path}{where} is not Python: {getattr(error, 'msg', error)}", _FIX) from None
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            known, value = _literal(node.value, names)
            names |= {node.targets[0].id: value} if known else {}
    values: dict[str, Any] = {}
    left: Unread = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        _read_call(call, names, values, left)
    if not values:
        raise UserError(f"{path} calls none of {', '.join(sorted(_CALLS))} with settings.", _FIX)
    return values, left


def _read_call(call: ast.Call, names: dict[str, Any], values: dict[str, Any], left: Unread) -> None:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == RESPONSES_ONLY:
        values[RESPONSES_ONLY] = True
    if name in ("TrainingArguments", "UnslothTrainingArguments"):
        values[TRANSFORMERS] = True
    if name not in (*_CALLS, _TRAINER):
        return
    by_place = zip(_BY_PLACE.get(name, ()), call.args, strict=False)
    given = [ast.keyword(key, value) for key, value in by_place if key]
    for keyword in [*given, *call.keywords]:
        key = keyword.arg or _REST
        where = f"{key} (line {keyword.value.lineno})"
        if name == _TRAINER and key not in (_REST, *_TRAINER_KEYS):
            continue
        known, value = _literal(keyword.value, names)
        if key == _REST:
            left.append((key, f"{where}: its settings are not read"))
        elif is_secret(key):
            left.append((key, f"{where}: {KEPT}"))
        elif not known:
            left.append((key, f"{where}: {_source_of(keyword.value)} is no literal"))
        elif values.setdefault(key, value) != value:
            both = f"{short(value)} in a second call; {short(values[key])} is taken"
            left.append((key, f"{where}: {'another value in a second call' if _nested(value, values[key]) else both}"))


def _source_of(node: ast.expr) -> str:
    """The code of the expression, without that of one with texts in it, which may be a token."""
    if any(isinstance(part, ast.Constant) and isinstance(part.value, str | bytes) for part in ast.walk(node)):
        return "an expression"
    try:
        return short(ast.unparse(node))
    except RecursionError:
        return "an expression"


def is_secret(key: str) -> bool:
    return bool(_SECRET.search(key.lower().replace("-", "_")))


def without_secrets(value: Any, name: str, left: list[str]) -> Any:
    """`value` without the secret keys in its mappings, a line for each in `left`. name: the key that has the value."""
    if isinstance(value, list | tuple):
        return [without_secrets(part, name, left) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, part in value.items():
        inner = f"{name}.{key}" if name else str(key)
        if is_secret(str(key)):
            left.append(f"{inner}: {KEPT}")
        else:
            kept[key] = without_secrets(part, inner, left)
    return kept


def _nested(*values: Any) -> bool:
    """Whether one of them has parts; a text may hold JSON."""
    return any(isinstance(value, dict | list | tuple | set) or str(value).strip()[:1] in ("{", "[") for value in values)


def named(key: str, value: Any) -> str:
    """A key that nobody knows, with its value where that has no parts: any of these may be a secret."""
    return key if _nested(value) else f"{key} {short(value)}"


def short(value: Any) -> str:
    text = masked(value if isinstance(value, str) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _literal(node: ast.expr, names: dict[str, Any]) -> tuple[bool, Any]:
    """`(whether it is one, its value)`: a literal, or a name that was given one before."""
    if isinstance(node, ast.Name) and node.id in names:
        return True, names[node.id]
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False, None


def _cells(notebook: dict[str, Any]) -> str:
    """The code of a notebook, without lines for the shell and for Jupyter."""
    lines: list[str] = []
    cells = notebook.get("cells") or []
    if not isinstance(cells, list):
        raise ValueError("not a notebook: its cells are not a list.")
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source") or ""
            text = "".join(map(str, source)) if isinstance(source, list) else str(source)
            kept = [] if text.lstrip().startswith("%%") else text.splitlines()
            for line in kept:
                code = line.lstrip()
                lines.append(line[: len(line) - len(code)] + "pass" if code[:1] in ("!", "%") else line)
    return "\n".join(lines) + "\n"


def dataset_files(values: dict[str, Any], folder: Path) -> list[str]:
    """The files that LLaMA-Factory's `dataset` means, by the dataset_info.json in its `dataset_dir`; else none."""
    given = values.get("dataset")
    names = given if isinstance(given, list) else str(given or "").split(",")
    directory = Path(str(values.get("dataset_dir") or "data"))
    for place in (directory, folder / directory):
        try:
            info = json.loads(_text(place / "dataset_info.json"))
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError, UserError):
            continue
        known = info if isinstance(info, dict) else {}
        entries = [known.get(str(name).strip()) for name in names]
        files = [_source(entry, place) for entry in entries if isinstance(entry, dict)]
        if len(files) == len(names) and all(files):
            return files
    return []


def _source(entry: dict[str, Any], place: Path) -> str:
    """The file of an entry of dataset_info.json, or its data set on the hub; empty where it has neither."""
    file = entry.get("file_name")
    if isinstance(file, str):
        return str(place / file) if (place / file).exists() else file
    return str(entry.get("hf_hub_url") or "")

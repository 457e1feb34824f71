"""Unsloth's scripts and notebooks: the settings of their calls, read as literals. Nothing is executed."""

import ast
from typing import Any

from common.config_values import KEPT, is_secret, plain, short
from common.other_trainings import ANOTHER_TRAINING, is_of_another

# Calls whose keyword arguments are settings, by the last part of their names.
CALLS = {
    "from_pretrained",
    "get_peft_model",
    "LoraConfig",
    "SFTConfig",
    "TrainingArguments",
    "UnslothTrainingArguments",
}
_TRAINER = "SFTTrainer"
_OF_SFT = {_TRAINER, "SFTConfig", "Trainer", "UnslothTrainer", "UnslothTrainingArguments"}
# Their arguments by place, as far as they are settings.
_BY_PLACE = {
    "from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit"),
    "get_peft_model": ("", "r", "target_modules", "lora_alpha", "lora_dropout"),
}
_TRAINER_KEYS = {"dataset_text_field", "max_seq_length", "packing"}  # the others are objects
RESPONSES_ONLY = "train_on_responses_only"  # Unsloth's function, and here a key: the script calls it
TRANSFORMERS = "TrainingArguments"  # likewise: the defaults are those of transformers, which Unsloth leaves alone
_REST = "**"  # stands for the keys in a `**` of a call

Unread = list[tuple[str, str]]  # keys of a script that are no literals, each with a line about it; "" for a call


def settings_of(tree: ast.Module) -> tuple[dict[str, Any], Unread, tuple[str, int] | None]:
    """`(the keys that calls set, those whose values are not read, name and line of a call)`.

    The last: one of another training than on answers, where the script has none of the latter.
    """
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            known, value = _literal(node.value, names)
            names |= {node.targets[0].id: value} if known else {}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    others = sorted((call for call in calls if is_of_another(_called(call))), key=lambda call: call.lineno)
    if others and not any(_called(call) in _OF_SFT for call in calls):
        return {}, [], (_called(others[0]), others[0].lineno)
    left: Unread = [("", f"{_called(call)} (line {call.lineno}): {ANOTHER_TRAINING}") for call in others]
    inside = {id(node) for call in others for node in ast.walk(call)}
    values: dict[str, Any] = {}
    for call in calls:
        if id(call) not in inside:
            _read_call(call, names, values, left)
    return values, left, None


def keyword_lines(tree: ast.Module) -> dict[str, int]:
    """The first line in which each key is set by a call whose arguments are settings."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) in CALLS]
    keywords = [(keyword.arg, keyword.value.lineno) for call in calls for keyword in call.keywords if keyword.arg]
    return dict(sorted(keywords, key=lambda found: -found[1]))


def _called(call: ast.Call) -> str:
    """The last part of the name that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _read_call(call: ast.Call, names: dict[str, Any], values: dict[str, Any], left: Unread) -> None:
    name = _called(call)
    if name == RESPONSES_ONLY:
        values[RESPONSES_ONLY] = True
    if name in ("TrainingArguments", "UnslothTrainingArguments"):
        values[TRANSFORMERS] = True
    if name not in (*CALLS, _TRAINER):
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
            both = f"{value!r} in a second call; {values[key]!r} is taken"
            shown = plain(value) and plain(values[key])
            left.append((key, f"{where}: {both if shown else 'another value in a second call'}"))


def _source_of(node: ast.expr) -> str:
    """The code of the expression, without that of one with texts in it, which may be a token."""
    if any(isinstance(part, ast.Constant) and isinstance(part.value, str | bytes) for part in ast.walk(node)):
        return "an expression"
    try:
        return short(ast.unparse(node))
    except RecursionError:
        return "an expression"


def _literal(node: ast.expr, names: dict[str, Any]) -> tuple[bool, Any]:
    """`(whether it is one, its value)`: a literal, or a name that was given one before."""
    if isinstance(node, ast.Name) and node.id in names:
        return True, names[node.id]
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False, None


def code_of(notebook: dict[str, Any]) -> str:
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

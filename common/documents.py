"""JSON and YAML files that may be a stranger's: read within bounds, any fault a UserError that names file and line."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from common.errors import UserError

_JSON_BYTES = 1 << 28  # the largest tokenizer.json that is known has 34 MB
YAML_BYTES = 200_000  # PyYAML reads 100 KB a second
_LEVELS = 100
_YAML_NODES = 100_000  # with aliases expanded


def read_json(path: Path, fix: str, allow_nan: bool = False) -> dict[str, Any]:
    """The file's JSON object. Raises UserError with `fix` as its remedy, and FileNotFoundError as `open` does.

    allow_nan: also numbers that are not finite, which JSON has not and Python writes.
    """
    try:
        return parse_json(_read(path, _JSON_BYTES, fix), allow_nan)
    except ValueError as error:
        raise UserError(f"{path} is {error}", fix) from None


def read_json_lines(path: Path, fix: str) -> list[dict[str, Any]]:
    """The objects in the lines of the file, numbers that are not finite included. Other lines are left out.

    The last line of a killed process may be cut. Raises as read_json does.
    """
    found = []
    for line in _read(path, _JSON_BYTES, fix).splitlines():
        try:
            found.append(parse_json(line, allow_nan=True))
        except ValueError:
            pass
    return found


def parse_json(text: bytes, allow_nan: bool = False) -> dict[str, Any]:
    """The object in the JSON text. Raises ValueError saying what the text is instead: "not JSON: ..."."""
    try:
        content = json.loads(text.decode(), parse_constant=None if allow_nan else refuse_constant)
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply.") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object.")
    if _too_deep(content):
        raise ValueError("nested too deeply.")
    return content


def refuse_constant(name: str) -> None:
    """For json's parse_constant: NaN and Infinity raise ValueError."""
    raise ValueError(f"{name} is not a number of JSON")


def _too_deep(content: dict[str, Any]) -> bool:
    level: list[Any] = [content]
    for _ in range(_LEVELS):
        parts = (part for value in level for part in (value.values() if isinstance(value, dict) else value))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def read_yaml(path: Path, fix: str) -> dict[Any, Any]:
    """The file's YAML mapping. Raises as read_json does, and UserError for a key that is given twice."""
    try:
        return parse_yaml(_read(path, YAML_BYTES, fix))
    except ValueError as error:
        raise UserError(f"{path} cannot be read as YAML: {error}", fix) from None


def parse_yaml(text: bytes | str) -> dict[Any, Any]:
    """The YAML mapping in the text, which has at most YAML_BYTES. Raises ValueError saying what is wrong."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("it does not hold `name: value` lines")
        _check_nodes(node)
        content: dict[Any, Any] = loader.construct_document(node)
    # the last two: PyYAML's own, for values that are not of their tag's kind
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as error:
        raise ValueError(error) from None
    return content


def key_lines(text: bytes | str) -> dict[str, int]:
    """The line of each key of the YAML mapping in the text, or of the JSON object; empty where it is none."""
    try:
        node = _Loader(text).get_single_node()
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: key.start_mark.line + 1 for key, _ in pairs if isinstance(key, yaml.ScalarNode)}


class _Loader(yaml.SafeLoader):
    """SafeLoader's scanner takes time in the square of open brackets."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level >= _LEVELS:
            raise ValueError("nested too deeply")
        super().fetch_flow_collection_start(token)


def _check_nodes(root: Any) -> None:
    """Raises ValueError for a key that is given twice, for `.nan`, and for aliases that expand to too much."""
    pending, count = [root], 0
    while pending:
        node, count = pending.pop(), count + 1
        line = f"line {node.start_mark.line + 1}"
        if count > _YAML_NODES:
            raise ValueError("it is too large, its aliases written out")
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                    seen.add(key.value)
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif node.tag.endswith(":float") and node.value.lower() == ".nan":
            raise ValueError(f"{line}: {node.value} is not a number")


def _read(path: Path, bound: int, fix: str) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(bound + 1)  # no more, whatever size the system says it has
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", fix) from None
    if len(text) > bound:
        raise UserError(f"{path} is larger than {bound / 1e6:.3g} MB, too large for what it should hold.", fix)
    return text


def fault_of(error: ValidationError) -> str:
    """`: it lacks model_hash, options`, or what is wrong with the first field."""
    faults = error.errors()
    missing = [".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "missing"]
    if missing:
        return f": it lacks {', '.join(sorted(missing))}"
    return f": {'.'.join(map(str, faults[0]['loc']))}: {faults[0]['msg']}"

"""Strangers' JSON and YAML: what is refused, and in which words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import documents
from common.documents import read_json, read_yaml
from common.errors import UserError

JSON_FAULTS = {
    "syntax": (
        '{\n"a": 1,,}',
        "is not JSON: Expecting property name enclosed in double quotes: line 2 column 8 (char 9)",
    ),
    "another root": ("[1]", "is not a JSON object."),
    "a number that is none": ('{"a": NaN}', "is not JSON: NaN is not a number of JSON"),
    "an infinity": ('{"a": -Infinity}', "is not JSON: -Infinity is not a number of JSON"),
    "depth": ('{"a":' * 200 + "1" + "}" * 200, "is nested too deeply."),
    "a depth bomb": ('{"a":' * 100_000, "is nested too deeply."),
    "another encoding": ("{}".encode("utf-16"), "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: "),
    "no contents": ("", "is not JSON: Expecting value: line 1 column 1 (char 0)"),
}
TENFOLD = "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(10))}]\n" for before, name in ("ab", "bc", "cd")
)
YAML_FAULTS = {
    "syntax": ("a: 1\nb: [", "line 2, column 5"),
    "another root": ("- 1", "it does not hold `name: value` lines"),
    "no contents": ("", "it does not hold `name: value` lines"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3: a is given twice"),
    "a key twice inside": ("a:\n  b: 1\n  b: 2", "line 3: b is given twice"),
    "a number that is none": ("a: 1\nb: .NaN", "line 2: .NaN is not a number"),
    "aliases that multiply": (f"a: &a [{'1, ' * 1000}]\n{TENFOLD}", "it is too large, its aliases written out"),
    "an alias of itself": ("a: &a [*a]", "it is too large, its aliases written out"),
    "brackets without end": ("a: " + "[" * 5000, "nested too deeply"),
    "a depth bomb": ("- " * 5000, "maximum recursion depth exceeded"),
    "a date that is none": ("a: 2024-13-45", "month must be in 1..12"),
    "a number without digits": ("a: !!int ''", "string index out of range"),
    "a date without digits": ("a: !!timestamp x", "'NoneType' object has no attribute 'groupdict'"),
    "neither yes nor no": ("a: !!bool x", "'x'"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "an object of Python": ("a: !!python/object/apply:os.getpid []", "could not determine a constructor"),
}


def refused(read: Callable[[Path, str], Any], path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path, "Do it again.")
    assert caught.value.fix == "Do it again."
    assert caught.value.what.startswith(f"{path} ")
    return caught.value.what.removeprefix(f"{path} ")


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_json_is_refused_in_words(tmp_path: Path, name: str) -> None:
    content, words = JSON_FAULTS[name]
    assert refused(read_json, tmp_path / "config.json", content).startswith(words)


@pytest.mark.parametrize("name", YAML_FAULTS)
def test_yaml_is_refused_in_words(tmp_path: Path, name: str) -> None:
    content, words = YAML_FAULTS[name]
    found = refused(read_yaml, tmp_path / "recipe.yaml", content)
    assert found.startswith("cannot be read as YAML: ")
    assert words in found


def test_sound_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('{"a": {"b": [1, 0.5, null, "あ"]}}', encoding="utf-8")
    assert read_json(path, "") == read_yaml(path, "") == {"a": {"b": [1, 0.5, None, "あ"]}}
    path.write_text('{"a": NaN}')
    assert str(read_json(path, "", allow_nan=True)) == "{'a': nan}"
    path.write_text("base: &base {a: 1}\nb: {<<: *base, c: .inf}\n")
    assert read_yaml(path, "") == {"base": {"a": 1}, "b": {"a": 1, "c": float("inf")}}


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file_is_said(tmp_path: Path, read: Callable[[Path, str], Any]) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", "")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "file" / "none", "")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path, "")


@pytest.mark.parametrize(("read", "bound"), [(read_json, "_JSON_BYTES"), (read_yaml, "YAML_BYTES")])
def test_what_has_no_end_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, str], Any], bound: str
) -> None:
    monkeypatch.setattr(documents, bound, 3_000_000)
    with pytest.raises(UserError, match="/dev/zero is larger than 3 MB, too large for what it should hold"):
        read(Path("/dev/zero"), "")

"""Hypothesis strategies that damage a good file: in its structure, in single values, or in its bytes."""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

TEXTS = [
    *("", " ", "\n", "\0", "a\0b", "\ud800", "é", "日本", "\u202e", "🙂" * 9, "x" * 300, "y" * 5_000),
    *("../../etc/passwd", "/", ".", "~nosuchuser/x", "~", "/dev/full", "owner/name", "a/b/c", "NUL.txt", "file.gguf"),
    *("-1", "0", "1", "1e400", "NaN", "inf", "9" * 25, "9" * 5_000, "0x10", "1_0", "true", "null", "None", "auto"),
    *("(a+)+$", "[", "*", "{", "{{ x }}", "{% for %}", "{{ 1/0 }}", "%s", "[bold]", "\x1b[31m", "<|im_end|>", "▁"),
    *("last:0", "0-3000000000", "q_proj=0", "q_proj=x", "=", "all-linear", "2024-99-99", "16GB", "999999999999GB"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**12, -(10**12), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
]
OTHERS = [None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": [1]}}, [1, "a", None], ["a", "b"], [0] * 99]
VALUES = st.one_of(
    *(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.sampled_from(OTHERS)),
    *(st.integers(-9, 300), st.floats(), st.text(max_size=9)),
)
# Written into the text as they are: no Python value stands for them.
_LITERALS = {
    "@deep@": "[" * 3_000 + "]" * 3_000,
    "@deeper@": "[" * 200_000,
    "@objects@": '{"a":' * 150 + "1" + "}" * 150,
    "@digits@": "1" + "0" * 400,
    "@more digits@": "1" + "0" * 5_000,
    "@constant@": "-Infinity",
}
_YAML_LITERALS = _LITERALS | {
    "@date@": "2024-99-99",
    "@tag@": "!!python/object/apply:os.getcwd []",
    "@binary@": "!!binary x",
    "@infinite@": "-.inf",
    "@alias@": "*nothing",
    "@bomb@": "&a [1, *a]",
    "@set@": "!!set {a, b}",
    "@base60@": "190:20:30",
}
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within `value`, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, part in inner:
        found += [(*at, key), *_places(part, (*at, key))]
    return found


def _at(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        value = value[key]
    return value


def changed(draw: Draw, value: Any, literals: dict[str, str]) -> Any:
    """`value` with one to three of its parts replaced, moved, renamed, removed or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = _places(value)
        if not places:
            return draw(VALUES)
        # a place near the top as often as any other: a long vocabulary would take nearly all
        top = [way for way in places if len(way) <= 2]
        way = draw(st.sampled_from(draw(st.sampled_from([places, top]))))
        holder, key = _at(value, way[:-1]), way[-1]
        match draw(st.sampled_from("vvvvvldrcwse")):
            case "v":
                holder[key] = copy.deepcopy(draw(VALUES))  # changed in turn, perhaps
            case "l":
                holder[key] = draw(st.sampled_from(sorted(literals)))
            case "d":
                del holder[key]
            case "r" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["", "unknown", "a.b", "0", f"{key}x", "\ud800"]))] = holder.pop(key)
            case "c":
                holder[key] = copy.deepcopy(_at(value, draw(st.sampled_from(places))))
            case "w":
                holder[key] = draw(st.sampled_from([[holder[key]], {"content": holder[key]}, [holder[key]] * 3]))
            case "s" if isinstance(holder[key], str):
                holder[key] = _text(draw, holder[key])
            case _ if isinstance(holder, list):
                holder += [copy.deepcopy(holder[key])] * draw(st.sampled_from([1, 2, 50]))
            case _:
                holder[key] = [holder[key], copy.deepcopy(draw(VALUES))]
    return value


def _text(draw: Draw, text: str) -> str:
    at = draw(st.integers(0, len(text)))
    inserted = draw(st.sampled_from(TEXTS))
    return draw(st.sampled_from([text[:at], text[:at] + inserted + text[at:], text.upper(), text * 2, inserted]))


def _as_json(value: Any, compact: bool = True) -> str:
    with_digits = json.dumps(_short(value), indent=None if compact else 1)
    for mark, literal in _LITERALS.items():
        with_digits = with_digits.replace(json.dumps(mark), literal)
    return with_digits


def _short(value: Any) -> Any:
    """`value` for writers that refuse whole numbers of more than 4,300 digits, and keys that are no texts."""
    if isinstance(value, dict):
        return {str(key): _short(part) for key, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list) else value


def json_text(draw: Draw, data: bytes) -> bytes:
    return _as_json(changed(draw, json.loads(data), _LITERALS)).encode()


def json_lines(draw: Draw, data: bytes) -> bytes:
    """One of the first lines changed."""
    lines = data.splitlines()
    at = draw(st.integers(0, min(len(lines), 9) - 1))
    lines[at] = draw(st.sampled_from([json_text, damaged]))(draw, lines[at])
    return b"\n".join(lines) + b"\n"


def yaml_text(draw: Draw, data: bytes) -> bytes:
    value = changed(draw, yaml.safe_load(data), _YAML_LITERALS)
    text = yaml.safe_dump(_without_surrogates(value), sort_keys=False, allow_unicode=True)
    for mark, literal in _YAML_LITERALS.items():
        text = text.replace(f"'{mark}'", literal)
    return text.encode()


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(part) for part in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def safetensors(draw: Draw, data: bytes) -> bytes:
    """The header changed as JSON, its length right or wrong."""
    size = int.from_bytes(data[:8], "little")
    header = json_text(draw, data[8 : 8 + size])
    if draw(st.booleans()) and len(header) < size:
        header = header.ljust(size)
    length = draw(st.sampled_from([len(header)] * 8 + [0, 1, 2**63, 10**8, len(header) + 1]))
    return struct.pack("<Q", length) + header + data[8 + size :]


def numbers(draw: Draw, data: bytes) -> bytes:
    """Whole numbers of a binary format overwritten, most of them near its beginning."""
    content = bytearray(data)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        form = draw(st.sampled_from(["<I", "<Q", "<B"]))
        end = draw(st.sampled_from([32, 400, 4_000, len(content)]))
        at = draw(st.integers(0, max(0, min(end, len(content)) - 8)))
        limit = 256 ** struct.calcsize(form)
        value = draw(st.sampled_from([0, 1, 2, 3, 8, 9, 12, 31, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
        if at + struct.calcsize(form) <= len(content):
            struct.pack_into(form, content, at, value % limit)
    return bytes(content)


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes cut off, changed, removed, repeated or put in; or the content of another file."""
    at = draw(st.integers(0, len(data)))
    to = min(len(data), at + draw(st.sampled_from([1, 2, 8, 100, 5_000])))
    match draw(st.sampled_from("ccffffrdioo")):
        case "c":
            return data[:at]
        case "f":
            content = bytearray(data or b"\0")
            for _ in range(draw(st.sampled_from([1, 1, 2, 8]))):
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
            return bytes(content)
        case "r":
            return data[:to] + data[at:]
        case "d":
            return data[:at] + data[to:]
        case "i":
            return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    text = data.decode("utf-8", "replace")
    other = [b"", HTML, b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32"), b"\xff" * 50, b"\0" * 500]
    other += [
        data.replace(b"\n", b"\r"),
        b"\n",
        b"null",
        b"[]",
        b"{}",
        b'"a"',
        b"1",
        b"[" * 150_000,
        data[::-1],
        b"- a",
    ]
    return draw(st.sampled_from(other))


_STRUCTURED = {
    ".json": json_text,
    ".jsonl": json_lines,
    ".yaml": yaml_text,
    ".safetensors": safetensors,
    ".gguf": numbers,
    ".model": numbers,
}


def file(draw: Draw, name: str, data: bytes) -> bytes:
    """The file's content, changed by what its name says it is, or damaged whatever it is."""
    change = _STRUCTURED.get(name[name.rfind(".") :], damaged)
    return draw(st.sampled_from([change, change, change, damaged]))(draw, data)


@st.composite
def files(draw: Draw, good: dict[str, bytes]) -> dict[str, bytes | None]:
    """One or two of the files, changed; None: removed."""
    found: dict[str, bytes | None] = {}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(good)))
        found[name] = None if draw(st.integers(0, 40)) == 0 else file(draw, name, good[name])
    return found

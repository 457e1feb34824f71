"""The part of Go's text/template that our Modelfiles use: what the tests execute in Ollama's place.

Source: Go's package text/template (actions, trim markers, range with an index, variables, eq, ne, not, and, or, len,
index, slice) and Ollama's template.go: dot holds `Messages`, each with `Role` and `Content`.
"""

import ast
import re
from collections.abc import Callable, Iterator
from typing import Any

_ACTION = re.compile(r'\{\{(-(?=\s))?\s*((?:"(?:\\.|[^"\\])*"|[^"])*?)\s*((?<=\s)-)?\}\}')
_WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|-?\d+|[()]|:=|,|\$?[\w.]+|\$)')
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "index": lambda value, at: value[at],
    "slice": lambda value, start: value[start:],
}
Scope = dict[str, Any]


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """What the template writes for `messages` (`role`, `content`). Raises ValueError for what ours do not use."""
    root = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    tokens = _lex(template)
    nodes, end = _parse(tokens)
    if end:
        raise ValueError(f"{end!r} closes nothing")
    return "".join(_run(nodes, root, {"$": root}))


def _lex(template: str) -> Iterator[tuple[str, str]]:
    """("text", ...) and ("action", ...), spaces beside trim markers removed."""
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        yield "text", text.rstrip(" \t\r\n") if found[1] else text
        yield "action", found[2]
        at, trim = found.end(), bool(found[3])
    text = template[at:]
    yield "text", text.lstrip(" \t\r\n") if trim else text


def _parse(tokens: Iterator[tuple[str, str]]) -> tuple[list[Any], str]:
    """Nodes up to an `end` or `else`, and which it was; "" at the end of the template."""
    nodes: list[Any] = []
    for kind, content in tokens:
        if kind == "text":
            nodes.append(content)
            continue
        word, _, rest = content.partition(" ")
        if word in ("end", "else"):
            return nodes, content
        nodes.append(_branch(word, rest, tokens) if word in ("if", "range") else ("value", _words(content)))
    return nodes, ""


def _branch(word: str, rest: str, tokens: Iterator[tuple[str, str]]) -> tuple[str, list[str], list[Any], list[Any]]:
    body, end = _parse(tokens)
    otherwise: list[Any] = []
    if end.startswith("else if "):  # its `end` closes us too
        otherwise = [_branch("if", end.removeprefix("else if "), tokens)]
    elif end == "else":
        otherwise, end = _parse(tokens)
    if not end:
        raise ValueError(f"{word} {rest} has no end")
    return word, _words(rest), body, otherwise


def _words(text: str) -> list[str]:
    words, at = [], 0
    while at < len(text):
        found = _WORD.match(text, at)
        if found is None:
            raise ValueError(f"{text[at:]!r} cannot be read")
        words.append(found[1])
        at = found.end()
    return words


def _run(nodes: list[Any], dot: Any, scope: Scope) -> Iterator[str]:
    scope = dict(scope)  # a variable lives as long as the block that declares it
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node[0] == "value":
            words = node[1]
            if words[1:2] == [":="]:
                scope[words[0]] = _value(words[2:], dot, scope)
            else:
                yield str(_value(words, dot, scope))
        elif node[0] == "if":
            yield from _run(node[2] if _value(node[1], dot, scope) else node[3], dot, scope)
        else:
            index, comma, item, declare, *rest = node[1]
            if (comma, declare) != (",", ":="):
                raise ValueError("range without its two variables")
            for number, value in enumerate(_value(rest, dot, scope)):
                yield from _run(node[2], value, scope | {index: number, item: value})


def _value(words: list[str], dot: Any, scope: Scope) -> Any:
    """A pipeline of one command: an operand, or a function and its operands."""
    values = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "(":
            depth, inner = 1, []
            while depth:
                word = rest.pop(0)
                depth += (word == "(") - (word == ")")
                inner.append(word)
            value = _value(inner[:-1], dot, scope)
            if rest and rest[0].startswith("."):  # a field of it
                value = value[rest.pop(0)[1:]]
            values.append(value)
        elif word in _FUNCTIONS and not values:
            values.append(_FUNCTIONS[word])
        else:
            values.append(_operand(word, dot, scope))
    if callable(values[0]):
        return values[0](*values[1:])
    if len(values) != 1:
        raise ValueError(f"{' '.join(words)} cannot be computed")
    return values[0]


def _operand(word: str, dot: Any, scope: Scope) -> Any:
    if word.startswith('"'):
        return ast.literal_eval(word)  # Go's \n, \" and \U0000feff are Python's too
    if word.lstrip("-").isdigit():
        return int(word)
    head, *fields = word.split(".")
    value = scope[head] if head else dot
    for name in filter(None, fields):
        value = value[name]
    return value

"""The shapes that rows come in, told apart by looking: each becomes an Example, or words for what is wrong with it."""

import json
from typing import Any

from common.data import Example

Row = dict[str, Any]
# What a shape's part may be called; `--field PART=COLUMN` says it where it is called otherwise.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output", "response"),
    "prompt": ("prompt", "question", "query"),
    "completion": ("completion", "response", "answer"),
    "text": ("text",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
KNOWN = "messages, ShareGPT's conversations, Alpaca's instruction and output, prompt and completion, or text"


class Fault(Exception):
    """What is wrong with a row, in words that go after its place."""


def read_row(row: Any, source: str, fields: dict[str, str]) -> tuple[str, Example]:
    """`(shape, example)`; `fields` renames columns. Raises Fault."""
    if not isinstance(row, dict):
        raise Fault("is no object with named fields")
    row = {key: value for key, value in row.items() if value is not None}
    for part, column in fields.items():
        if column in row:
            row[part] = row.pop(column)

    def get(part: str) -> Any:
        return next((row[name] for name in NAMES[part] if name in row), None)

    tools = tuple(_parsed(get("tools"), "tools", list) or ())
    head = [_message("system", text, 0)] if (text := get("system")) else []
    if (turns := get("messages")) is not None:
        return "messages", _conversation(head, _turns(turns, "messages"), source, tools)
    if (turns := get("conversations")) is not None:
        return "ShareGPT", _conversation(head, _turns(turns, "conversations"), source, tools)
    if get("instruction") is not None and get("output") is not None:
        return "Alpaca", _conversation(head, _alpaca(get), source, tools)
    if get("prompt") is not None and get("completion") is not None:
        prompt, answer = get("prompt"), get("completion")
        said = _turns(prompt, "prompt") if isinstance(prompt, list) else [_message("user", prompt, 1)]
        said += _turns(answer, "completion") if isinstance(answer, list) else [_message("assistant", answer, 2)]
        return "prompt and completion", _conversation(head, said, source, tools)
    if (text := get("text")) is not None:
        if not isinstance(text, str) or not text.strip():
            raise Fault("`text` is empty" if isinstance(text, str) else "`text` is no text")
        _whole_letters(text, "`text`")
        return "plain text", Example((), source, text=text)
    raise Fault(f"has none of {KNOWN} (its keys: {', '.join(map(str, row)) or 'none'})")


def _parsed(value: Any, name: str, kind: type) -> Any:
    """CSV and Parquet keep lists as JSON texts."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise Fault(f"`{name}` is a text that is not JSON") from None
    if value is not None and value != "" and not isinstance(value, kind):
        raise Fault(f"`{name}` is not a {'list' if kind is list else 'object'}")
    return value or None


def _turns(value: Any, name: str) -> list[Row]:
    turns = _parsed(value, name, list)
    if not turns:
        raise Fault(f"`{name}` is not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, number: int) -> Row:
    if not isinstance(turn, dict):
        raise Fault(f"turn {number} is no object")
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES:
        raise Fault(f"turn {number} has the role {role!r}; known: {', '.join(_ROLES)}")
    calls = _parsed(turn.get("tool_calls"), "tool_calls", list)
    if role == "function_call":
        calls, content = _parsed(f"[{content}]" if not str(content).startswith("[") else content, "value", list), ""
    message = _message(_ROLES[role], "" if content is None and calls else content, number)
    if calls:
        message["tool_calls"] = [_call(call, number) for call in calls]
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(said := turn.get(key), str) and said.strip():
            message["reasoning_content"] = said
            break
    message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    if turn.get("weight", 1) not in (0, 1) or turn.get("train", True) not in (True, False):
        raise Fault(f"turn {number}: `weight` can be 0 or 1, `train` true or false")
    if not (turn.get("weight", 1) and turn.get("train", True)):
        message["train"] = False
    return message


def _message(role: str, content: Any, number: int) -> Row:
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise Fault(f"turn {number} has no text in `content`")
    _whole_letters(content, f"turn {number}")
    return {"role": role, "content": content}


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Fault(f"turn {number} holds {kind!r}, and only text is trained")


def _whole_letters(text: str, where: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Fault(f"{where} holds half a character (a lone surrogate such as \\ud83d)")


def _call(call: Any, number: int) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Fault(f"turn {number} has a tool call without a function's name")
    arguments = function.get("arguments", {})
    found = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(arguments, number)}}
    return found | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _arguments(value: Any, number: int) -> Row:
    try:
        return _parsed(value, "arguments", dict) or {}
    except Fault as fault:
        raise Fault(f"turn {number}: {fault}") from None


def _alpaca(get: Any) -> list[Row]:
    turns = []
    for number, pair in enumerate(_parsed(get("history"), "history", list) or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"`history` {number} is no pair of question and answer")
        turns += [_message("user", pair[0], number), _message("assistant", pair[1], number)]
    asked, further = get("instruction"), get("input")
    if not isinstance(asked, str):
        raise Fault("`instruction` is no text")
    if isinstance(further, str) and further.strip():
        asked = f"{asked}\n\n{further}"
    if not isinstance(get("output"), str):
        raise Fault("`output` is no text")
    return [*turns, _message("user", asked, len(turns) + 1), _message("assistant", get("output"), len(turns) + 2)]


def _conversation(head: list[Row], turns: list[Row], source: str, tools: tuple[Row, ...]) -> Example:
    messages = [*head, *turns]
    for number, message in enumerate(messages, 1 - len(head)):
        if message["role"] == "system" and message is not messages[0]:
            raise Fault(f"turn {number} is a system turn; it can only be the first")
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise Fault(f"turn {number}: the assistant's turn is empty, so there is nothing to learn")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Fault("has no assistant turn, so there is nothing to learn")
    if not any(message.get("train", True) for message in answers):
        raise Fault("has no assistant turn that is trained: all say train: false or weight: 0")
    return Example(tuple(messages), source, tools)

"""A turn as any data set writes it -> a message as `Example` has it, or a Fault that says what is wrong with it."""

import json
from typing import Any

from common.data.dataset import Example
from common.data.message_forms import after_reasoning, reasoning_is_open

Row = dict[str, Any]
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
_LEAST_WEIGHT = 1e-6  # that is not 0; sums of such weights, and of their inverses, are safe in float32
_SWITCHES = {"": None, "true": True, "false": False}


# What is read of a turn.
TURN_KEYS = {
    *("role", "from", "content", "value", "tool_calls", "reasoning_content", "reasoning", "thinking"),
    *("name", "tool_call_id", "weight", "train"),
}
_PLAIN = {"role", "content"}


class Fault(Exception):
    """What is wrong with a row, worded so that it follows the name of the row."""


class LeftOut(Fault):
    """Why a sound row is not trained: it is left out, and counted with others of its `kind`."""

    kind = ""


class Empty(LeftOut):
    kind = "rows without an answer"


class Untrained(LeftOut):
    kind = "rows with train: false or weight: 0"


def parsed(value: Any, name: str, kind: type) -> Any:
    """`value` as `kind`, or None where it is empty; CSV and Parquet keep lists as JSON texts. Raises Fault."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Fault(f"`{name}` is a text that is not JSON") from None
    if value is not None and value != "" and not isinstance(value, kind):
        raise Fault(f"`{name}` is not a {'list' if kind is list else 'object'}")
    return value or None


def read_turns(value: Any, name: str) -> list[Row]:
    turns = parsed(value, name, list)
    if not turns:
        raise Fault(f"`{name}` is not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, number: int) -> Row:
    if not isinstance(turn, dict):
        raise Fault(f"turn {number} is not an object")
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise Fault(f"turn {number} has the role {role!r}; known: {', '.join(_ROLES)}")
    calls = parsed(turn.get("tool_calls"), "tool_calls", list)
    if role == "function_call":
        calls, content = parsed(f"[{content}]" if not str(content).startswith("[") else content, "value", list), ""
    message = message_of(_ROLES[role], "" if content is None and calls else content, number)
    if calls:
        message["tool_calls"] = [_call(call, number) for call in calls]
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(reasoning := turn.get(key), str) and reasoning.strip():
            message["reasoning_content"] = reasoning
            break
    message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    weight = loss_weight(turn, f"turn {number}: ")
    if weight != 1:
        message |= {"weight": weight} if weight else {"train": False}
    return message


def loss_weight(given: Row, where: str) -> float:
    """What the losses of a turn, or a row, count by its `train` and `weight`; 0: it is not trained. Raises Fault."""
    if "weight" not in given and "train" not in given:
        return 1.0
    weight, train = (_from_csv(given.get(name)) for name in ("weight", "train"))
    if train not in (None, True, False):
        raise Fault(f"{where}`train` can be true or false")
    weight = 1 if weight is None else weight
    if not isinstance(weight, int | float) or not (weight == 0 or _LEAST_WEIGHT <= weight <= 1 / _LEAST_WEIGHT):
        raise Fault(f"{where}`weight` can be 0, or a number between 0.000001 and 1000000")
    return float(weight) if train in (None, True) else 0.0


def _from_csv(value: Any) -> Any:
    """A number or a switch, which CSV holds as text; None for an empty cell."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in _SWITCHES:
        return _SWITCHES[word]
    try:
        return float(word)
    except ValueError:
        return value


def message_of(role: str, content: Any, number: int) -> Row:
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise Fault(f"turn {number} has no text in `content`")
    return {"role": role, "content": content}


def _part(part: Any, number: int) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Fault(f"turn {number} holds {kind!r}, and only text is trained")


def check_characters(text: str, where: str) -> None:
    """Raises Fault for half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault(f"{where} holds half a character (a lone surrogate such as \\ud83d)") from None


def _call(call: Any, number: int) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Fault(f"turn {number} has a tool call without a function's name")
    arguments = function.get("arguments", {})
    found = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(arguments, number)}}
    return found | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _arguments(value: Any, number: int) -> Row:
    try:
        found = parsed(value, "arguments", dict) or {}
        _check_json(found, "`arguments`")
        return found
    except Fault as fault:
        raise Fault(f"turn {number}: {fault}") from None


def read_tool(tool: Any) -> Row:
    """A tool's schema as templates expect it; LLaMA-Factory writes the bare function, which is wrapped."""
    if not isinstance(tool, dict):
        raise Fault("`tools` holds something that is not an object")
    _check_json(tool, "`tools`")
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _check_json(value: Any, where: str) -> None:
    """Raises Fault where a template could not write the value as JSON: Parquet may hold dates, JSON half characters."""
    try:
        check_characters(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError, RecursionError):
        raise Fault(f"{where} holds a value that JSON cannot express") from None


def conversation(
    head: list[Row], turns: list[Row], source: str, tools: tuple[Row, ...], weight: float = 1.0
) -> Example:
    """The row of `head`, its system message if any, and `turns`. Raises Fault, and Empty for an empty answer."""
    messages = [*head, *turns]
    for number, message in enumerate(messages, 1 - len(head)):
        check_characters(message["content"], f"turn {number}")
        if message.keys() != _PLAIN:  # names, ids, calls, reasoning
            _check_json(message, f"turn {number}")
        if message["role"] == "system" and message is not messages[0]:
            raise Fault(f"turn {number} is a system turn; it can only be the first")
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        if reasoning_is_open(message["content"]):
            raise Empty(f"turn {number}: the assistant's turn breaks off within its reasoning")
        if not after_reasoning(message["content"]).strip() and not message.get("tool_calls"):
            raise Empty(f"turn {number}: the assistant's turn is empty, so there is nothing to learn")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise Fault("has no assistant turn, so there is nothing to learn")
    if not any(message.get("train", True) for message in answers):
        raise Untrained("has no assistant turn that is trained: all have train: false or weight: 0")
    return Example(tuple(messages), source, tools, weight=weight)

"""The forms in which chat templates take a row's messages: reasoning apart, tool calls as text, no system turn."""

import itertools
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from common.data.chat_template import TAGS, Message

_OPEN, _CLOSE = "<think>", "</think>"


def split_thinking(messages: list[Message], unopened: bool) -> list[Message]:
    """Reasoning at the start of an answer becomes `reasoning_content`: data sets write it either way.

    unopened: also where the first tag is lacking.
    """
    result = []
    for message in messages:
        found = _split(message["content"], unopened) if message["role"] == "assistant" else None
        if found and not message.get("reasoning_content"):
            message = message | {"content": found[1], "reasoning_content": found[0]}
        result.append(message)
    return result


def _split(content: str, unopened: bool = True) -> tuple[str, str] | None:
    """`(reasoning, the answer after it)` of a block such as `<think>...</think>` at the start; None without reasoning.

    Where the prompt opens the block, data sets lack the first tag; `</think>` then stands on a line of its own.
    """
    start = content.lstrip()
    for opening, end in TAGS.items():
        if start.startswith(opening):
            reasoning, found, after = start.removeprefix(opening).partition(end)
            return (reasoning.strip(), after.lstrip()) if found else None
    before, found, after = content.partition(_CLOSE)
    alone = found and before.endswith("\n") and (not after or after.startswith("\n")) and _OPEN not in before
    return (before.strip(), after.lstrip()) if unopened and alone else None


def after_reasoning(content: str) -> str:
    """What an answer says after the reasoning at its start."""
    return found[1] if (found := _split(content)) else content


def reasoning_is_open(content: str) -> bool:
    """Whether an answer starts with reasoning that never ends: its generation was cut."""
    start = content.lstrip()
    return any(start.startswith(opening) and end not in content for opening, end in TAGS.items())


def reasoning_as_trained(messages: list[Message], unopened: bool, think: bool) -> list[Message]:
    """The reasoning apart, or with thinking off left out, as training gives the messages to a chat template."""
    parted = split_thinking(messages, unopened)
    return parted if think else without_reasoning(parted)


def without_reasoning(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]


def reasoning_of(messages: list[Message]) -> dict[int, str]:
    """By number, what the assistant thinks in the turns that have reasoning."""
    answers = (pair for pair in enumerate(messages) if pair[1]["role"] == "assistant")
    return {number: reasoning for number, message in answers if (reasoning := message.get("reasoning_content"))}


def ends_with_reasoning(messages: list[Message]) -> bool:
    """Whether the last answer has reasoning."""
    return bool(next((m.get("reasoning_content") for m in reversed(messages) if m["role"] == "assistant"), None))


def with_inline_reasoning(messages: list[Message], numbers: Iterable[int], block: str) -> list[Message]:
    """Reasoning at the start of these answers in such a block, for templates that have no field for it."""
    result = list(messages)
    for number in numbers:
        (message,) = without_reasoning([messages[number]])
        reasoning, content = messages[number]["reasoning_content"], message["content"] or ""
        result[number] = message | {"content": block.format(reasoning) + content}
    return result


def fold_system(messages: list[Message]) -> list[Message] | None:
    """The system text at the head of the first user turn, for templates without a system role; None without one."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return None
    first = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def tool_call_forms(messages: list[Message]) -> list[list[Message]]:
    """Arguments as an object or as JSON text, each with empty content as "" and as None: templates differ."""
    if not any(message.get("tool_calls") for message in messages):
        return [messages]
    forms = itertools.product((False, True), repeat=2)
    return [[_with_calls(message, none, text) for message in messages] for none, text in forms]


def _parsed(arguments: str) -> Any:
    with suppress(ValueError):
        return json.loads(arguments)
    return arguments


def _with_calls(message: Message, none: bool, text: bool) -> Message:
    if not (calls := message.get("tool_calls")):
        return message
    calls = [{**call, "function": {**call["function"]}} for call in calls]
    for call in calls:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str) != text:
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False) if text else _parsed(arguments)
    content = None if none and not message["content"] else message["content"]
    return message | {"tool_calls": calls, "content": content}

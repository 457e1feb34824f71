"""A conversation as text by the model's chat template, and the position of each assistant turn in it.

A turn is what the model must write after the prompt that it is served: from the end of the generation prompt to the
token that ends the turn. To find both, the conversation is rendered a second time with placeholders for the answers.
A turn's span is known only where the placeholders, replaced by the answers, give the first rendering to the letter.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from common.data.chat_template import OPEN_BLOCK, PLACEHOLDER, ChatTemplate, Message, Refused, closing
from common.data.dataset import Example
from common.data.message_forms import (
    ends_with_reasoning,
    fold_system,
    split_thinking,
    tool_call_forms,
    without_reasoning,
)
from common.data.tool_text import uses_tools
from common.data.turn_edges import BadRow, MaskedRow, Unlabeled, find_end, find_start

REMEDY = "Remove the row, or use another template (--chat-template)."
# How templates strip an answer.
_STRIPPED = (
    lambda text: text,
    lambda text: text.strip(),
    lambda text: text.lstrip(),
    lambda text: text.rstrip(),
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


@dataclass(frozen=True)
class Turn:
    """Characters `start` to `stop` are what the model writes, `stop` to `end` its end token; none: `stop == end`."""

    message: int  # its index in the row
    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Conversation:
    text: str
    turns: list[Turn]
    notes: tuple[str, ...] = ()  # what was changed so that the template takes the row
    generation_spans: tuple[tuple[int, int], ...] | None = None  # by the template's own tags, where it has them
    messages: tuple[Message, ...] = ()  # the row's, in the form that the template was given


def locate_turns(example: Example, template: ChatTemplate) -> Conversation:
    """The row as text with its assistant turns.

    Raises BadRow where the template refuses it, or its turns cannot be located exactly.
    """
    messages = split_thinking([dict(message) for message in example.messages])
    notes: list[str] = []
    if template.thinking == "off" and any(message.get("reasoning_content") for message in messages):
        notes.append("reasoning left out (--thinking off)")
        messages = without_reasoning(messages)
    refusal: Exception | None = None
    for form in tool_call_forms(messages):
        for given, folded in ((form, False), (fold_system(form), True)):
            if given is None:
                continue
            try:
                found = _locate(given, example.tools, template)
            except (Refused, Unlabeled) as error:
                refusal = refusal or error
                continue
            turns = [replace(turn, message=turn.message + folded) for turn in found.turns]
            notes += ["system text put into the first user turn"] * folded
            return replace(found, turns=turns, notes=tuple(notes), messages=tuple(given))
    if isinstance(refusal, Unlabeled):
        reason, fix = f"this row cannot be labeled exactly: {refusal}.", REMEDY
    else:
        reason = f"the model's chat template refuses this row: {refusal}"
        fix = "Reorder the row's turns as the template requires."
    if uses_tools(example) and not template.takes_tools:
        fix = "It takes no tools: --tools system writes tools and calls as text, --tools drop leaves out the tools."
    raise BadRow(example.source, reason, fix)


def _locate(messages: list[Message], tools: Any, template: ChatTemplate) -> Conversation:
    think = ends_with_reasoning(messages)
    masked, answers = _with_placeholders(messages)
    if think and (inline := _inlined(messages, masked, tools, template)):
        messages, masked = inline
    row = MaskedRow(template, tools, think, masked)
    text = row.render(masked)
    for number, message in enumerate(masked):
        if message["role"] == "assistant" and message["content"] and message["content"] not in text:
            raise Unlabeled(f"the template leaves out or changes the answer of turn {number + 1}")
    rendered = row.render(messages)
    contents = _contents(text, rendered, answers)
    spans: list[Turn] = []
    for number, message in enumerate(masked):
        if message["role"] != "assistant":
            continue
        prompt = template.prompt(masked[:number], tools, think)
        at, start, block = find_start(text, prompt, number)
        if block and row.is_last(number):  # the served prompt has a block that the rendering leaves out
            reasoning = message.get("reasoning_content")
            if think and reasoning:
                opened = OPEN_BLOCK.search(block)
                block += f"{reasoning}{closing(opened[1] if opened else '<think>')}"
                contents[reasoning] = answers[reasoning]
            text = text[:at] + block + text[start:]
            start = len(prompt)
        stop, end, lacking = find_end(row, text, start, number)
        text += lacking
        spans.append(Turn(number, start, stop, end))
    if think and not any(name in text for name in answers if name.endswith(f"q{len(masked) - 1}qr")):
        raise Unlabeled("the template leaves out the reasoning of the last turn (--thinking off trains without it)")
    text, turns = _filled_in(text, spans, contents)
    _check_complete(messages, tools, text, turns)
    generated = template.generation_spans(messages, tools, think, rendered) if text == rendered else None
    return Conversation(text, turns, generation_spans=generated)


def _with_placeholders(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """The messages with placeholders for what the assistant says and thinks, and the text behind each."""
    salt = ""
    while any(f"qTWINTUNE{salt}q" in str(message) for message in messages):
        salt += "x"
    masked, answers = [], {}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            message = {**message}
            for key in ("content", "reasoning_content"):
                if message.get(key):
                    placeholder = PLACEHOLDER.format(salt, number, key[0])
                    answers[placeholder] = message[key]
                    message[key] = placeholder
        masked.append(message)
    return masked, answers


def _inlined(
    messages: list[Message], masked: list[Message], tools: Any, template: ChatTemplate
) -> tuple[list[Message], list[Message]] | None:
    """The last turn's reasoning within its answer, where the template has no field for it; None where it has."""
    placeholder = masked[-1].get("reasoning_content", "")
    if not placeholder or placeholder in template.render(masked, tools, False, True):
        return None
    both = []
    for rows in (messages, masked):
        last = {key: value for key, value in rows[-1].items() if key != "reasoning_content"}
        last["content"] = f"<think>\n{rows[-1]['reasoning_content']}{closing('<think>')}{rows[-1]['content']}"
        both.append([*rows[:-1], last])
    return (both[0], both[1]) if placeholder in template.render(both[1], tools, False, True) else None


def _contents(masked: str, text: str, answers: dict[str, str]) -> dict[str, str]:
    """The text in place of each placeholder of `masked`: an answer, as the template strips it."""
    pieces = re.split("(" + "|".join(map(re.escape, answers)) + ")", masked) if answers else [masked]
    if not text.startswith(pieces[0]):
        raise Unlabeled("the template renders the row differently for other answers")
    found: dict[str, str] = {}
    at = len(pieces[0])
    for placeholder, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        variants = (strip(answers[placeholder]) for strip in _STRIPPED)
        content = next((variant for variant in variants if text.startswith(variant + literal, at)), None)
        if content is None:
            raise Unlabeled("the template changes the assistant's text")
        if placeholder in found:
            raise Unlabeled("the template writes an answer twice")
        found[placeholder] = content
        at += len(content) + len(literal)
    if at != len(text):
        raise Unlabeled("the template renders the row differently for other answers")
    return found


def _filled_in(text: str, turns: list[Turn], contents: dict[str, str]) -> tuple[str, list[Turn]]:
    """The text with its placeholders replaced, and the turns at their positions in it."""
    growth = [(text.find(name) + len(name), len(content) - len(name)) for name, content in contents.items()]

    def moved(at: int) -> int:
        return at + sum(more for end, more in growth if end <= at)

    for name, content in contents.items():
        text = text.replace(name, content)
    return text, [Turn(turn.message, moved(turn.start), moved(turn.stop), moved(turn.end)) for turn in turns]


def _check_complete(messages: list[Message], tools: Any, text: str, turns: list[Turn]) -> None:
    """Raises Unlabeled where something is missing: templates without a system role, or tools, drop them silently."""
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise Unlabeled(f"the template leaves out or changes the text of turn {number} ({message['role']})")
        if message["role"] == "tool" and not _contains(text, message["content"].strip()):
            raise Unlabeled(f"the template leaves out the tool's answer of turn {number}")
    for tool in tools:
        if str(tool.get("function", tool).get("name", "")) not in text[: turns[0].start if turns else None]:
            raise Unlabeled("the template leaves out the row's tools")
    for turn in turns:
        for call in messages[turn.message].get("tool_calls") or []:
            if call["function"]["name"] not in text[turn.start : turn.stop]:
                raise Unlabeled(f"the template leaves out the tool call of turn {turn.message + 1}")


def _contains(text: str, content: str) -> bool:
    """Whether `text` holds `content`, as it is or escaped as in a JSON string."""
    escaped = (json.dumps(content, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return content in text or any(form in text for form in escaped)

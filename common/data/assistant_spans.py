"""A conversation as text by the model's chat template, and the position of each assistant turn in it.

A turn is what the model must write after the prompt that it is served: from the end of the generation prompt to the
token that ends the turn. To find both, the conversation is rendered a second time with placeholders for the answers.
A turn's span is known only where the placeholders, replaced by the answers, give the first rendering to the letter.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from common.data.chat_template import EMPTY_BLOCK, OPEN_BLOCK, ChatTemplate, Message, Refused, closing
from common.data.dataset import Example
from common.data.message_forms import (
    ends_with_reasoning,
    fold_system,
    split_thinking,
    tool_call_forms,
    without_reasoning,
)
from common.data.placeholders import Filled, Placeholders
from common.data.tool_text import uses_tools
from common.data.turn_edges import BadRow, MaskedRow, Unlabeled, find_end, find_start

REMEDY = "Remove the row, or use another template (--chat-template)."


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
    messages = split_thinking([dict(message) for message in example.messages], template.has_think_tags)
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
            turns = found.turns
            if folded:
                turns = [replace(turn, message=turn.message + 1) for turn in turns]
                notes.append("system text put into the first user turn")
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
    """With placeholders for every turn, or, where the template reads what they say, for the assistant's alone."""
    try:
        return _located(messages, tools, template, every=True)
    except (Refused, Unlabeled):
        return _located(messages, tools, template, every=False)


def _located(messages: list[Message], tools: Any, template: ChatTemplate, every: bool) -> Conversation:
    think = ends_with_reasoning(messages)
    placeholders = Placeholders(messages, every)
    masked = placeholders.messages
    if think and (inline := _inlined(messages, masked, tools, template)):
        messages, masked = inline
    row = MaskedRow(template, tools, think, masked)
    text = row.render(masked)
    written = {place[0] for place in placeholders.found(text)}
    for number, message in enumerate(masked):
        content = message["content"] if message["role"] == "assistant" else ""
        if content and content not in written and content not in text:
            raise Unlabeled(f"the template leaves out or changes the answer of turn {number + 1}")
    rendered = row.render(messages)
    contents = placeholders.contents(text, rendered)
    text, spans, inferred = _turns(row, text, placeholders if every else None)
    if think and not any(place[0].endswith(f"q{len(masked) - 1}qr") for place in placeholders.found(text)):
        raise Unlabeled("the template leaves out the reasoning of the last turn (--thinking off trains without it)")
    filled = Filled(text, placeholders, placeholders.originals | contents)
    text = filled.text
    turns = [Turn(turn.message, *map(filled.moved, (turn.start, turn.stop, turn.end))) for turn in spans]
    _check_prompts(row, messages, text, [turn for turn in turns if turn.message in inferred])
    _check_complete(messages, tools, text, turns)
    generated = template.generation_spans(messages, tools, think, rendered) if text == rendered else None
    return Conversation(text, turns, generation_spans=generated)


def _turns(row: MaskedRow, text: str, placeholders: Placeholders | None) -> tuple[str, list[Turn], set[int]]:
    """`(the masked text, its assistant turns, the messages of those that were inferred)`.

    A turn within the same text as one that was found before is inferred: to render each turn's prompt again would take
    a time that grows with the square of the turns. The text grows where the last turn lacks a block that its prompt
    has, or a part of its end. placeholders: of every turn; None: each turn is found.
    """
    regions = _regions(row, text, placeholders) if placeholders else {}
    spans, inferred = list[Turn](), set[int]()
    for number, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        if number in regions and (edges := row.known_edges(number, text, regions[number])):
            start, end = regions[number]
            stop = end - len(edges.tail)
            spans.append(Turn(number, start + len(edges.head), stop, stop + edges.token))
            inferred.add(number)
            continue
        prompt = row.template.prompt(row.messages[:number], row.tools, row.think)
        at, start, block = find_start(text, prompt, number)
        if block and row.is_last(number):  # the served prompt has a block that the rendering leaves out
            reasoning = message.get("reasoning_content")
            if row.think and reasoning:
                opened = OPEN_BLOCK.search(block)
                block += f"{reasoning}{closing(opened[1] if opened else '<think>')}"
            text = text[:at] + block + text[start:]
            start = len(prompt)
        stop, end, lacking = find_end(row, text, start, number)
        text += lacking
        spans.append(Turn(number, start, stop, end))
        if number in regions and not block and not lacking:
            row.learn_edges(number, text, regions[number], (start, stop, end))
    return text, spans, inferred


def _regions(row: MaskedRow, text: str, placeholders: Placeholders) -> dict[int, tuple[int, int]]:
    """By assistant turn, the characters between the texts of the turns before and after it, where these are known."""
    first, last = dict[int, int](), {-1: 0}
    for place in placeholders.found(text):
        first.setdefault(int(place[1]), place.start())
        last[int(place[1])] = place.end()
    first[len(row.messages)] = len(text)
    found = {}
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant" and number - 1 in last and number + 1 in first:
            start, end = last[number - 1], first[number + 1]
            if start <= first.get(number, start) <= last.get(number, end) <= end:
                found[number] = start, end
    return found


def _check_prompts(row: MaskedRow, messages: list[Message], text: str, turns: list[Turn]) -> None:
    """Raises Unlabeled where an inferred turn does not follow its prompt: of the first, second, fourth ... and last."""
    for number, turn in enumerate(turns, 1):
        if number & (number - 1) and number < len(turns):
            continue
        prompt = row.template.prompt(messages[: turn.message], row.tools, row.think)
        between = text[len(prompt) : turn.start]
        if not text.startswith(prompt) or len(prompt) > turn.start or (between and not EMPTY_BLOCK.fullmatch(between)):
            raise Unlabeled(f"turn {turn.message + 1} renders differently with and without what follows it")


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


def _check_complete(messages: list[Message], tools: Any, text: str, turns: list[Turn]) -> None:
    """Raises Unlabeled where something is missing: templates without a system role, or tools, drop them silently."""
    at = 0
    for number, message in enumerate(messages, 1):
        content = message["content"].strip() if message["role"] in ("system", "user", "tool") else ""
        found = text.find(content, at)  # most often the next one stands behind the one before
        at = found if found >= 0 else at
        if found >= 0 or content in text:
            continue
        if message["role"] != "tool":
            raise Unlabeled(f"the template leaves out or changes the text of turn {number} ({message['role']})")
        if not _contains(text, content):
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

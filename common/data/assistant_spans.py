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
    reasoning_of,
    split_thinking,
    tool_call_forms,
    with_inline_reasoning,
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
    think: bool = False  # whether it was told that the model thinks
    unreasoned: frozenset[int] = frozenset()  # messages whose reasoning the template leaves out: they are not trained


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
            if found.unreasoned:
                notes.append("reasoning of earlier turns left out by the template: these turns are not trained")
            if folded:
                turns = [replace(turn, message=turn.message + 1) for turn in found.turns]
                found = replace(found, turns=turns, unreasoned=frozenset(n + 1 for n in found.unreasoned))
                notes.append("system text put into the first user turn")
            return replace(found, notes=tuple(notes))
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
    placeholders = Placeholders(messages, every)
    masked = placeholders.messages
    reasoned = reasoning_of(masked)
    inline = _inline(masked, reasoned, tools, template)
    messages, masked = (with_inline_reasoning(some, inline, template.block) for some in (messages, masked))
    think = ends_with_reasoning(placeholders.messages) or _writes_reasoning(masked, reasoned, tools, template)
    row = MaskedRow(template, tools, think, reasoned, masked)
    text = row.render(masked)
    written = {place[0] for place in placeholders.found(text)}
    for number, message in enumerate(masked):
        content = message["content"] if message["role"] == "assistant" else ""
        if content and content not in written and content not in text:
            raise Unlabeled(f"the template leaves out or changes the answer of turn {number + 1}")
    rendered = row.render(messages)
    contents = placeholders.contents(text, rendered)
    text, spans, inferred = _turns(row, text, placeholders if every else None)
    written = {place[0] for place in placeholders.found(text)}
    unreasoned = frozenset(number for number, reasoning in reasoned.items() if reasoning not in written)
    if len(masked) - 1 in unreasoned:
        raise Unlabeled("the template leaves out the reasoning of the last turn (--thinking off trains without it)")
    filled = Filled(text, placeholders, placeholders.originals | contents)
    text = filled.text
    turns = [Turn(turn.message, *map(filled.moved, (turn.start, turn.stop, turn.end))) for turn in spans]
    _check_prompts(row, messages, text, [turn for turn in turns if turn.message in inferred])
    _check_complete(messages, tools, text, turns)
    generated = template.generation_spans(messages, tools, think, rendered) if text == rendered else None
    return Conversation(text, turns, (), generated, tuple(messages), think, unreasoned)


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
        at, start, block = find_start(row, text, number)
        lacks = _lacking_block(row, text, number, block)
        if lacks:
            text = text[:at] + lacks + text[start:]
            start = at + len(block if number in row.reasoned else lacks)
        stop, end, lacking = find_end(row, text, start, number)
        text += lacking
        spans.append(Turn(number, start, stop, end))
        if number in regions and not block and not lacks and not lacking:
            row.learn_edges(number, text, regions[number], (start, stop, end))
    return text, spans, inferred


def _lacking_block(row: MaskedRow, text: str, number: int, served: str) -> str:
    """The thinking block that the rendering leaves out of the last turn. served: what the prompt has of it."""
    if not row.is_last(number):
        return ""
    reasoning, opened = row.messages[number].get("reasoning_content", ""), OPEN_BLOCK.search(served)
    if number not in row.reasoned:
        return served + closing(opened[1]) if opened else served
    if not reasoning or reasoning in text:
        return served
    if not served:
        return row.template.own_block(reasoning)
    return f"{served}{reasoning}{closing(opened[1] if opened else '<think>')}"


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
        if not any(_leads_to(text, prompt, turn.start) for prompt in row.prompts(messages, turn.message)):
            raise Unlabeled(f"turn {turn.message + 1} renders differently with and without what follows it")


def _leads_to(text: str, prompt: str, start: int) -> bool:
    """Whether `text` has the prompt before position `start`, with at most an empty thinking block between."""
    between = text[len(prompt) : start]
    return text.startswith(prompt) and len(prompt) <= start and (not between or bool(EMPTY_BLOCK.fullmatch(between)))


def _inline(masked: list[Message], reasoned: dict[int, str], tools: Any, template: ChatTemplate) -> list[int]:
    """The turns whose reasoning stands within the answer, where the template has no other way to write it."""
    if not reasoned or template.takes_reasoning or template.own_block("q"):
        return []
    text = template.render(with_inline_reasoning(masked, reasoned, template.block), tools, False, True)
    return [number for number, reasoning in reasoned.items() if reasoning in text]


def _writes_reasoning(masked: list[Message], reasoned: dict[int, str], tools: Any, template: ChatTemplate) -> bool:
    """Whether the row's text has the reasoning of any turn; some templates keep that of the last alone."""
    text = template.render(masked, tools, False, True) if reasoned else ""
    return any(reasoning in text for reasoning in reasoned.values())


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

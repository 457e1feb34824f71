"""A conversation as text by the model's chat template, and where in it each assistant turn stands.

A turn is what the model must write after the prompt it is served: from the end of the generation prompt to the token
that ends the turn. To find both, the conversation is rendered a second time with marks in place of the answers. Only
where the marks, exchanged for the answers, give the first rendering to the letter is the place of a turn known.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from common.data.chat_template import EMPTY_BLOCK, HELLO, MARK, OPEN_BLOCK, THINKING_REST, Message, Renderer, closed
from common.data.dataset import Example
from common.errors import UserError

_SAID = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_VARIANTS = (
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
    """Characters `start` to `end` are what the model writes, from `stop` on its end token; none: `stop == end`."""

    message: int  # its place in the row
    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class Conversation:
    text: str
    turns: list[Turn]
    notes: tuple[str, ...] = ()  # what was changed so that the template takes the row
    marks: tuple[tuple[int, int], ...] | None = None  # what the template itself marks as generated, where it does
    messages: tuple[Message, ...] = ()  # the row's, in the form that the template was given


class Unlabeled(Exception):
    """Why a row's turns cannot be placed exactly."""


def split_thinking(messages: list[Message]) -> list[Message]:
    """`<think>...</think>` at the start of an answer becomes `reasoning_content`, as data sets write it either way."""
    result = []
    for message in messages:
        found = _SAID.match(message["content"]) if message["role"] == "assistant" else None
        if found and not message.get("reasoning_content"):
            message = message | {"content": message["content"][found.end() :], "reasoning_content": found[1].strip()}
        result.append(message)
    return result


def place(example: Example, renderer: Renderer) -> Conversation:
    """Raises UserError naming the row where the template refuses it, or its turns cannot be placed exactly."""
    messages = split_thinking([dict(message) for message in example.messages])
    notes: list[str] = []
    if renderer.thinking == "off" and any(message.get("reasoning_content") for message in messages):
        notes.append("reasoning left out (--thinking off)")
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    refusal: Exception | None = None
    for form in _forms(messages):
        for chosen, into_user in ((form, False), (fold_system(form), True)):
            try:
                if chosen is None:
                    continue
                placed = _place(chosen, example, renderer)
            except Exception as error:  # a template may raise anything; jinja2's TemplateError most often
                refusal = refusal or error
                continue
            shift = int(into_user)  # the system turn that went into the next
            turns = [replace(turn, message=turn.message + shift) for turn in placed.turns]
            notes += ["system text put into the first user turn"] * into_user
            return replace(placed, turns=turns, notes=tuple(notes), messages=tuple(chosen))
    if isinstance(refusal, Unlabeled):
        raise UserError(
            f"{example.source}: this row cannot be labeled exactly: {refusal}.",
            "Take the row out, or use another template (--chat-template).",
        )
    raise UserError(
        f"{example.source}: the model's chat template refuses this row: {refusal}",
        "Bring the row's turns into the order that the template wants.",
    )


def _thinks(messages: list[Message]) -> bool:
    """Whether the row is one with reasoning: its last answer tells."""
    return bool(next((m.get("reasoning_content") for m in reversed(messages) if m["role"] == "assistant"), None))


def _forms(messages: list[Message]) -> list[list[Message]]:
    """Templates read tool calls in different ways: arguments as an object or as JSON, no content as empty or none."""
    if not any(message.get("tool_calls") for message in messages):
        return [messages]
    forms = []
    for none in (False, True):
        for text in (False, True):
            form = []
            for message in messages:
                if calls := message.get("tool_calls"):
                    calls = [{**c, "function": {**c["function"]}} for c in calls]
                    for call in calls:
                        arguments = call["function"]["arguments"]
                        call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False) if text else arguments
                    content = None if none and not message["content"] else message["content"]
                    message = message | {"tool_calls": calls, "content": content}
                form.append(message)
            forms.append(form)
    return forms


def fold_system(messages: list[Message]) -> list[Message] | None:
    """The system text at the head of the first user turn, for templates without such a role."""
    if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
        return None
    first = messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _check_said(messages: list[Message], tools: Any, text: str, turns: list[Turn]) -> None:
    """A template that knows no system turn, or no tools, may leave them out without a word."""
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise Unlabeled(f"the template leaves out or changes the text of turn {number} ({message['role']})")
        said = message["content"].strip() if message["role"] == "tool" else ""
        if (
            said not in text
            and json.dumps(said, ensure_ascii=False)[1:-1] not in text
            and (json.dumps(said)[1:-1] not in text)
        ):
            raise Unlabeled(f"the template leaves out the tool's answer of turn {number}")
    for tool in tools:
        if str(tool.get("function", tool).get("name", "")) not in text[: turns[0].start if turns else None]:
            raise Unlabeled("the template leaves out the row's tools (take them out of the row to train without)")
    for turn in turns:
        for call in messages[turn.message].get("tool_calls") or []:
            if call["function"]["name"] not in text[turn.start : turn.stop]:
                raise Unlabeled(f"the template leaves out the tool call of turn {turn.message + 1}")


def _place(messages: list[Message], example: Example, renderer: Renderer) -> Conversation:
    tools, think = example.tools, _thinks(messages)
    marked, answers = _with_marks(messages)
    if think and (inline := _inlined(messages, marked, tools, renderer)):
        messages, marked = inline
    placeholder = renderer.render(marked, tools, False, think)
    for number, message in enumerate(marked):
        if message["role"] == "assistant" and message["content"] and message["content"] not in placeholder:
            raise Unlabeled(f"the template leaves out or changes the answer of turn {number + 1}")
    rendered = renderer.render(messages, tools, False, think)
    contents = _contents(placeholder, rendered, answers)
    places: list[tuple[int, ...]] = []
    for number, message in enumerate(marked):
        if message["role"] != "assistant":
            continue
        before, last = renderer.prompt(marked[:number], tools, think), number == len(marked) - 1
        at, start, block = _start(placeholder, before, number)
        if block and last:  # the served prompt has a block that the rendering leaves out
            thought = message.get("reasoning_content")
            if think and thought:
                opened = OPEN_BLOCK.search(block)
                block += f"{thought}{closed(opened[1] if opened else '<think>')}"
                contents[thought] = answers[thought]
            placeholder = placeholder[:at] + block + placeholder[start:]
            start = len(before)
        stop, end, lacking = _end(placeholder, start, number, marked, tools, think, renderer)
        placeholder += lacking
        places.append((number, start, stop, end))
    if think and not any(mark in placeholder for mark in answers if mark.endswith(f"q{len(marked) - 1}qr")):
        raise Unlabeled("the template leaves out the reasoning of the last turn (--thinking off trains without it)")

    longer = [(placeholder.find(mark) + len(mark), len(said) - len(mark)) for mark, said in contents.items()]
    turns = [
        Turn(number, *(at + sum(more for end, more in longer if end <= at) for at in edges))
        for number, *edges in places
    ]
    for mark, said in contents.items():
        placeholder = placeholder.replace(mark, said)
    _check_said(messages, tools, placeholder, turns)
    marks = renderer.marks(messages, tools, think, rendered) if placeholder == rendered else None
    return Conversation(placeholder, turns, marks=marks)


def _with_marks(messages: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """The messages with marks for what the assistant says and thinks, and what each mark stands for."""
    salt = ""
    while any(f"qTWINTUNE{salt}q" in str(message) for message in messages):
        salt += "x"
    marked, answers = [], {}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            message = {**message}
            for key in ("content", "reasoning_content"):
                if message.get(key):
                    mark = MARK.format(salt, number, key[0])
                    answers[mark] = message[key]
                    message[key] = mark
        marked.append(message)
    return marked, answers


def _inlined(
    messages: list[Message], marked: list[Message], tools: Any, renderer: Renderer
) -> tuple[list[Message], list[Message]] | None:
    """The last turn's reasoning within its answer, where the template knows no field for it; None where it does."""
    mark = marked[-1].get("reasoning_content", "")
    if not mark or mark in renderer.render(marked, tools, False, True):
        return None
    both = []
    for rows in (messages, marked):
        last = {key: value for key, value in rows[-1].items() if key != "reasoning_content"}
        last["content"] = f"<think>\n{rows[-1]['reasoning_content']}{closed('<think>')}{rows[-1]['content']}"
        both.append([*rows[:-1], last])
    return (both[0], both[1]) if mark in renderer.render(both[1], tools, False, True) else None


def _contents(placeholder: str, text: str, answers: dict[str, str]) -> dict[str, str]:
    """What stands in `text` for each mark in `placeholder`: an answer, or what the template strips it to."""
    pieces = re.split("(" + "|".join(map(re.escape, answers)) + ")", placeholder) if answers else [placeholder]
    if not text.startswith(pieces[0]):
        raise Unlabeled("the template renders the row differently for other answers")
    found: dict[str, str] = {}
    at = len(pieces[0])
    for mark, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        said = next((v for f in _VARIANTS if text.startswith((v := f(answers[mark])) + literal, at)), None)
        if said is None:
            raise Unlabeled("the template changes the assistant's text")
        if mark in found:
            raise Unlabeled("the template writes an answer twice")
        found[mark] = said
        at += len(said) + len(literal)
    if at != len(text):
        raise Unlabeled("the template renders the row differently for other answers")
    return found


def _start(placeholder: str, before: str, number: int) -> tuple[int, int, str]:
    """Where the prompt `before` ends, where the turn starts, and the block that the prompt has besides."""
    if placeholder.startswith(before):
        return len(before), _after_block(placeholder, len(before)), ""
    same = len(common_prefix(placeholder, before))
    for at in range(same, max(same - len("</think>\n"), -1), -1):  # "<" may begin the block and the answer
        if before[at:].strip() and THINKING_REST.fullmatch(before[at:]):
            return at, _after_block(placeholder, at), before[at:]
    raise Unlabeled(f"turn {number + 1} renders differently with and without what follows it")


def _after_block(text: str, at: int) -> int:
    """Past an empty thinking block at `at`: never train a model to close one."""
    block = EMPTY_BLOCK.match(text, at)
    return block.end() if block else at


def common_prefix(one: str, other: str) -> str:
    """What both begin with."""
    short = min(len(one), len(other))
    return one[: next((n for n in range(short) if one[n] != other[n]), short)]


def _end(
    placeholder: str, start: int, number: int, marked: list[Message], tools: Any, think: bool, renderer: Renderer
) -> tuple[int, int, str]:
    """Where the turn's end token starts and ends in `placeholder`, the same place twice where it has none to learn.

    And what the last turn lacks of its end: some templates write it only when another turn follows.
    """
    message, last = marked[number], number == len(marked) - 1
    calls, mark = message.get("tool_calls"), message["content"]

    def after(text: str) -> str:
        return text[text.find(mark) + len(mark) if mark and mark in text else _after_block(text, start) :]

    through = renderer.render(marked[: number + 1], tools, False, think)
    if not (mark and mark in through) and through[:start] != placeholder[:start]:
        raise Unlabeled(f"turn {number + 1} renders differently with and without what follows it")
    ends, here = after(through), after(placeholder)
    offset = len(placeholder) - len(here)
    following = here
    if last:  # what would follow shows what belongs to the turn
        call = calls[0] if calls else {}
        name, key = call.get("function", {}).get("name"), call.get("id", "0")
        other = {"role": "tool", "content": "q", "name": name, "tool_call_id": key} if calls else HELLO
        try:
            following = after(renderer.render([*marked, other], tools, False, think))
        except Exception:  # a template may refuse such a row: then the turn's own rendering must do
            following = ends
    common = common_prefix(ends, following)
    head = _before_header(following, marked, number, tools, think, renderer)
    if head and not following.startswith(ends):  # some write the beginning of the next turn too early
        common = common[: len(head)]
    tokens = list(renderer.special.finditer(common))
    if tokens:
        token = tokens[-1]
    elif alone := renderer.special.search(ends):
        if not last:  # the end that a finished conversation has is another (gpt-oss): that one is learned, this is not
            if calls:
                raise Unlabeled(f"the tool call of turn {number + 1} has no end of its own")
            return offset, offset, ""
        token = alone
    else:
        tokens = list(renderer.special.finditer(head))
        if not tokens:
            raise Unlabeled("the template ends a turn with no special token, so the model would never stop")
        token = tokens[-1]
        if last:
            return offset + token.start(), offset + token.end(), head[len(here) : token.end()]
    return offset + token.start(), offset + token.end(), ""


def _before_header(
    following: str, marked: list[Message], number: int, tools: Any, think: bool, renderer: Renderer
) -> str:
    """What stands between a turn and the head of the user's next, if there is a token in it, else nothing.

    A user's turn at the start shows what the head is; what precedes it there may end as an answer does.
    """
    if marked[number].get("tool_calls") or (number + 1 < len(marked) and marked[number + 1]["role"] != "user"):
        return ""
    said = marked[number + 1]["content"] if number + 1 < len(marked) else HELLO["content"]
    head = following[: following.find(said)]
    mark = MARK.format("", 0, "u")
    first = renderer.render([{"role": "user", "content": mark}], tools, False, think)
    same = common_prefix(head[::-1], first[: first.find(mark)][::-1])[::-1]
    token = renderer.special.search(same)
    head = head[: len(head) - len(same[token.start() :] if token else same)]
    return head if renderer.special.search(head) else ""

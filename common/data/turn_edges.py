"""Where an assistant turn starts and ends in a rendered conversation that has placeholders for the answers."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from common.data.chat_template import EMPTY_BLOCK, HELLO, PLACEHOLDER, THINKING_REST, ChatTemplate, Message, Refused
from common.errors import UserError


class Unlabeled(Exception):
    """Why a row's turns cannot be located exactly."""


class BadRow(UserError):
    """A row that cannot be trained on, and why."""

    def __init__(self, source: str, reason: str, fix: str) -> None:
        super().__init__(f"{source}: {reason}", fix)
        self.source, self.reason = source, reason

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.source, self.reason, self.fix)


@dataclass(frozen=True)
class MaskedRow:
    """A row with placeholders for what the assistant says and thinks, and how it is rendered."""

    template: ChatTemplate
    tools: Any
    think: bool  # whether it is rendered with thinking on
    reasoned: Collection[int]  # the numbers of the messages with reasoning
    messages: list[Message]

    def render(self, messages: list[Message]) -> str:
        return self.template.render(messages, self.tools, False, self.think)

    def prompts(self, messages: list[Message], number: int) -> Iterator[str]:
        """What may stand before a turn: first with thinking off where it is the last, and the one without reasoning."""
        if self.think and self.is_last(number) and number not in self.reasoned:
            yield self.template.prompt(messages[:number], self.tools, False)
        yield self.template.prompt(messages[:number], self.tools, self.think)

    def is_last(self, number: int) -> bool:
        return number == len(self.messages) - 1

    def known_edges(self, number: int, text: str, region: tuple[int, int]) -> "Edges | None":
        """Of the turns of this kind that were found before, the only edges that fit these characters of the text."""
        start, end = region
        fitting = [edges for edges in self.template.edges.get(self._kind(number), ()) if edges.fit(text, start, end)]
        return fitting[0] if len(fitting) == 1 else None

    def learn_edges(self, number: int, text: str, region: tuple[int, int], turn: tuple[int, int, int]) -> None:
        """Keep what stands around a turn. turn: its start, stop and end."""
        (first, last), (start, stop, end) = region, turn
        if first <= start <= stop <= end <= last:
            edges, known = Edges(text[first:start], text[stop:last], end - stop), self.template.edges
            if edges not in known.setdefault(self._kind(number), []) and len(known[self._kind(number)]) < _KNOWN_EDGES:
                known[self._kind(number)].append(edges)

    def _kind(self, number: int) -> tuple[object, ...]:
        """What a template may look at to choose what it writes around a turn."""
        message = self.messages[number]
        roles = [self.messages[n]["role"] if 0 <= n < len(self.messages) else "" for n in (number - 1, number + 1)]
        has = [bool(message.get(key)) for key in ("content", "reasoning_content", "tool_calls")]
        return (*roles, *has, self.think, number in self.reasoned, bool(self.tools))


_KNOWN_EDGES = 8  # of one kind


@dataclass(frozen=True)
class Edges:
    """What a template writes around a turn, from the text of the turn before to that of the turn after it."""

    head: str  # to the turn's start
    tail: str  # from its end token on
    token: int  # characters of the end token

    def fit(self, text: str, start: int, end: int) -> bool:
        room = end - start >= len(self.head) + len(self.tail)
        inside = room and text.startswith(self.head, start) and text.startswith(self.tail, end - len(self.tail))
        return inside and not EMPTY_BLOCK.match(text, start + len(self.head))


def find_start(row: MaskedRow, text: str, number: int) -> tuple[int, int, str]:
    """Where a turn's prompt ends in `text`, where the turn starts, and the thinking block that only the prompt has."""
    for prompt in row.prompts(row.messages, number):
        if found := _end_of(prompt, text):
            return found
    raise Unlabeled(f"turn {number + 1} renders differently with and without what follows it")


def _end_of(prompt: str, text: str) -> tuple[int, int, str] | None:
    if text.startswith(prompt):
        return len(prompt), _after_block(text, len(prompt)), ""
    same = len(common_prefix(text, prompt))
    for at in range(same, max(same - len("</think>\n"), -1), -1):  # both block and answer may begin with "<"
        if prompt[at:].strip() and THINKING_REST.fullmatch(prompt[at:]):
            return at, _after_block(text, at), prompt[at:]
    return None


def _after_block(text: str, at: int) -> int:
    """The position after an empty thinking block at `at`: a model must never be trained to close one."""
    block = EMPTY_BLOCK.match(text, at)
    return block.end() if block else at


def common_prefix(one: str, other: str) -> str:
    """The longest text that both begin with."""
    short = min(len(one), len(other))
    return one[: next((n for n in range(short) if one[n] != other[n]), short)]


def find_end(row: MaskedRow, text: str, start: int, number: int) -> tuple[int, int, str]:
    """Where the turn's end token starts and ends in `text`: the same position twice where it has none to learn.

    Third, what the last turn lacks of its end: some templates write it only when another turn follows.
    """
    message, last = row.messages[number], row.is_last(number)
    calls, placeholder = message.get("tool_calls"), message["content"]

    def after(rendered: str) -> str:
        if placeholder and placeholder in rendered:
            return rendered[rendered.find(placeholder) + len(placeholder) :]
        return rendered[_after_block(rendered, start) :]

    through = row.render(row.messages[: number + 1])
    if not (placeholder and placeholder in through) and through[:start] != text[:start]:
        raise Unlabeled(f"turn {number + 1} renders differently with and without what follows it")
    ends, here = after(through), after(text)
    offset = len(text) - len(here)
    following = here
    if last:  # another turn behind it shows what belongs to this one
        try:
            following = after(row.render([*row.messages, _reply(calls)]))
        except Refused:  # then the turn's own rendering must do
            following = ends
    shared = common_prefix(ends, following)
    head = _before_header(row, following, number)
    if head and not following.startswith(ends):  # some templates write the beginning of the next turn too early
        shared = shared[: len(head)]
    special = row.template.special
    token = _last_match(special, shared)
    if token is None and (token := special.search(ends)) and not last:
        # a finished conversation ends with another token (gpt-oss): that one is learned, this is not
        if calls:
            raise Unlabeled(f"the tool call of turn {number + 1} has no end of its own")
        return offset, offset, ""
    if token is None:
        token = _last_match(special, head)
        if token is None:
            raise Unlabeled("the template ends a turn with no special token, so the model would never stop")
        if last:
            return offset + token.start(), offset + token.end(), head[len(here) : token.end()]
    return offset + token.start(), offset + token.end(), ""


def _reply(calls: list[Any] | None) -> Message:
    """A turn that may follow the assistant's: a tool's result after a call, else a user's."""
    if not calls:
        return HELLO
    name, key = calls[0].get("function", {}).get("name"), calls[0].get("id", "0")
    return {"role": "tool", "content": "q", "name": name, "tool_call_id": key}


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _before_header(row: MaskedRow, following: str, number: int) -> str:
    """The text between a turn and the header of the user's next, if a special token is in it, else "".

    A user's turn at the start shows what the header is; what precedes it there may end as an answer does.
    """
    if row.messages[number].get("tool_calls"):
        return ""
    reply = HELLO if row.is_last(number) else row.messages[number + 1]
    if reply["role"] != "user":
        return ""
    head = following[: following.find(reply["content"])]
    placeholder, special = PLACEHOLDER.format("", 0, "u"), row.template.special
    first = row.render([{"role": "user", "content": placeholder}])
    same = common_prefix(head[::-1], first[: first.find(placeholder)][::-1])[::-1]
    token = special.search(same)
    head = head[: len(head) - len(same[token.start() :] if token else same)]
    return head if special.search(head) else ""

"""A row once it is read, the rows of a data set, and the keys that identify them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
LISTED = 1000  # rows of one kind that are named at most


@dataclass(frozen=True)
class Example:
    """A conversation, or plain text (then `messages` is empty).

    A message has `role` and `content`, and may have `reasoning_content`, `tool_calls` (arguments parsed),
    `tool_call_id`, `name`, `train: False` where its tokens carry no loss, and `weight` where their losses do not count
    once. `tools` are JSON schemas for the template.
    """

    messages: tuple[dict[str, Any], ...]
    source: str  # "train.jsonl:17"
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    weight: float = 1.0  # of the row's losses


@dataclass
class Counted(Generic[Item]):
    """How many there are, and the first thousand of them."""

    count: int = 0
    first: list[Item] = field(default_factory=list)

    def add(self, item: Item) -> None:
        self.extend(Counted(1, [item]))

    def extend(self, others: "Counted[Item]") -> None:
        self.count += others.count
        self.first += others.first[: LISTED - len(self.first)]

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Dataset:
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]
    formats: dict[str, int] = field(default_factory=dict)  # how many rows came in which format
    left_out: dict[str, Counted[str]] = field(default_factory=dict)  # sources of rows not trained on, by kind
    bad: Counted[tuple[str, str]] = field(default_factory=Counted)  # places and faults of rows that --on-bad-row drops
    unread: dict[str, list[str]] = field(default_factory=dict)  # by file: columns that are not read
    mix: list[str] = field(default_factory=list)  # of several sources: how often an epoch has the rows of each

    def described(self) -> str:
        """`ShareGPT, 400 rows`."""
        return ", ".join(f"{format}, {count} rows" for format, count in self.formats.items())


def prompt_of(row: Example) -> list[dict[str, Any]]:
    """The turns before the row's last assistant turn; none for plain text."""
    if row.text is not None:
        return []
    last = max(turn for turn, message in enumerate(row.messages) if message["role"] == "assistant")
    return [dict(message) for message in row.messages[:last]]


def first_texts(rows: Iterable[Example], characters: int) -> list[str]:
    """The texts of the first rows, turn by turn, about `characters` of them in all."""
    found: list[str] = []
    for row in rows:
        if characters <= 0:
            break
        contents = [row.text] if row.text is not None else [message.get("content") for message in row.messages]
        texts = [text[:characters] for text in contents if isinstance(text, str)]
        found += texts
        characters -= sum(map(len, texts))
    return found


def content_key(row: Example) -> str:
    """The row's contents as one text: equal for equal rows, whatever their source and weights."""
    return json.dumps([_unweighted(row.messages), row.tools, row.text], sort_keys=True, ensure_ascii=False)


def beginning_keys(row: Example) -> list[str]:
    """The `content_key` of the row up to its first answer, and up to the one before its last; none with one answer."""
    ends = [turn + 1 for turn, message in enumerate(row.messages) if message["role"] == "assistant"]
    return [content_key(replace(row, messages=row.messages[:end])) for end in (ends[0], ends[-2])] if ends[1:] else []


def prompt_key(row: Example) -> str:
    """The row without its last answer, as one text: equal for rows that ask the same."""
    asked = row.text if row.text is not None else _unweighted(prompt_of(row))
    return json.dumps([asked, row.tools], sort_keys=True, ensure_ascii=False)


def _unweighted(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]

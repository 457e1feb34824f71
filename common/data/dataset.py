"""What a row is once it is read, and what a set of rows is known by."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A conversation, or plain text (then `messages` is empty).

    A message has `role` and `content`, and may have `reasoning_content`, `tool_calls` (arguments parsed),
    `tool_call_id`, `name`, and `train: False` where its tokens carry no loss.
    `tools` are JSON schemas for the template.
    """

    messages: tuple[dict[str, Any], ...]
    source: str  # "train.jsonl:17"
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Dataset:
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    shapes: dict[str, int] = field(default_factory=dict)  # how many rows came in which shape
    empty: list[str] = field(default_factory=list)  # where rows without an answer stood: they are left out

    def described(self) -> str:
        """`ShareGPT, 400 rows`."""
        return ", ".join(f"{shape}, {count} rows" for shape, count in self.shapes.items())


def prompt_of(row: Example) -> list[dict[str, Any]]:
    """The turns before the row's last assistant turn; of plain text there are none."""
    if row.text is not None:
        return []
    last = max(turn for turn, message in enumerate(row.messages) if message["role"] == "assistant")
    return [dict(message) for message in row.messages[:last]]


def said(rows: list[Example], characters: int) -> list[str]:
    """What the first rows say, turn by turn, about so many characters of it."""
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
    """The row's contents as one text: equal for equal rows, wherever they came from."""
    return json.dumps([row.messages, row.tools, row.text], sort_keys=True, ensure_ascii=False)


def prompt_key(row: Example) -> str:
    """What is asked: equal where rows differ in their last answer alone."""
    asked = row.text if row.text is not None else prompt_of(row)
    return json.dumps([asked, row.tools], sort_keys=True, ensure_ascii=False)


def data_hash(data: Dataset) -> str:
    """SHA-256 over the contents of training and validation rows in order; names and formatting do not enter."""
    digest = hashlib.sha256()
    for part in (data.train, data.valid):
        for row in part:
            digest.update(content_key(row).encode())
            digest.update(b"\n")
        digest.update(b"\0")
    return digest.hexdigest()

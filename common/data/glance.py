"""Rows at a glance, before a model and its tokenizer are known: how long they about are, and whether in Japanese."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from common.data.dataset import Example, first_texts

MOST_ROWS = 20_000  # of more the first are looked at
# UTF-8 bytes of a token: a character of Japanese, three of English. Tokenizers of today need fewer tokens.
_BYTES = 3
_TURN = 6  # tokens that a chat template adds to a turn
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_KANA = re.compile(r"[\u3040-\u30ff]")  # Chinese has none
_SAMPLE = 50_000  # characters by which the language is told


@dataclass(frozen=True)
class Glance:
    sizes: list[tuple[int, int]]  # about how many tokens and label tokens each row has
    japanese: bool


def glance(rows: Iterable[Example]) -> Glance:
    looked_at = [*islice(rows, MOST_ROWS)]
    text = "".join(first_texts(looked_at, _SAMPLE))
    japanese = bool(_KANA.search(text)) and 5 * len(_JAPANESE.findall(text)) > len(text)
    return Glance([_size(row) for row in looked_at], japanese)


def _size(row: Example) -> tuple[int, int]:
    if row.text is not None:
        return _tokens(row.text) + 2, _tokens(row.text) + 1
    turns = [(turn["role"] == "assistant", _TURN + _turn_tokens(turn)) for turn in row.messages]
    labels = sum(tokens for answer, tokens in turns if answer)
    tools = _tokens(json.dumps(row.tools, ensure_ascii=False, default=str)) if row.tools else 0
    return max(labels + 1, sum(tokens for _, tokens in turns) + tools), labels


def _turn_tokens(turn: dict[str, Any]) -> int:
    return sum(_tokens(str(turn[part])) for part in ("content", "reasoning_content", "tool_calls") if turn.get(part))


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // _BYTES)

"""Example -> Encoded: rendered by the model's chat template, with an exact mask of the tokens that carry loss."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data import Example
from common.errors import UserError
from common.seam import Progress

# A thinking model's empty block belongs to the prompt: never train a model to close it.
_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
_EMPTY_THINKING_END = re.compile(r"(\s*)<think>\s*</think>\s*\Z")
# Llama 3.2's template writes today's date otherwise: the same recipe would be other tokens tomorrow.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Encoded:
    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] bool: True where the token is a label
    source: str

    @property
    def label_tokens(self) -> int:
        return int(self.mask[1:].sum())  # nothing predicts the first token


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises UserError where there is none, or no chat template in it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first}", "Fetch the model's files anew.") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the model has no chat template, so chat rows cannot be rendered.",
            "Use the model's instruction-tuned (-it, -Instruct) version.",
        )
    return tokenizer


def template_hash(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def render(tokenizer: Any, messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
    """The conversation as text, by the model's own template, thinking off where the template knows it."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=generation_prompt,
        enable_thinking=False,
        date_string=_DATE,
    )


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Token ids and label mask: the assistant's turns, each turn's end included, nothing else.

    The text is tokenised once, as a whole. Raises UserError naming the row where the template cannot be labelled
    exactly: a prompt that is no prefix of the conversation, or a token that lies across a turn's edge.
    """
    text, spans = _label_spans(example, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoding["input_ids"], np.int32)
    starts, ends = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        inside = (starts >= start) & (ends <= end) & (ends > start)
        if np.any((starts < start) & (ends > start)) or np.any((starts < end) & (ends > end)):
            raise _unlabelled(example, "a token lies across the edge of an assistant turn")
        first = int(np.argmax(inside))
        prompt = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
        if prompt != ids[:first].tolist():
            raise _unlabelled(example, "the prompt's tokens are not a prefix of the conversation's")
        mask |= inside
    return Encoded(ids, mask, example.source)


def _label_spans(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character span of each assistant turn with its end token."""
    messages = [dict(message) for message in example.messages]
    try:
        text = render(tokenizer, messages)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(tokenizer, messages[:turn], generation_prompt=True)
            through = render(tokenizer, messages[: turn + 1])
            if through.startswith(before) and not text.startswith(through):
                # Qwen3 writes its empty block into every prompt, and leaves it out of all turns but the last
                bare = _EMPTY_THINKING_END.sub(lambda found: found[1], before)
                before, through = bare, bare + through[len(before) :]
            if not (through.startswith(before) and text.startswith(through)):
                raise _unlabelled(example, f"turn {turn + 1} renders differently with and without what follows it")
            spans.append(_turn_span(through, len(before), message["content"], example, tokenizer))
    except UserError:
        raise
    except Exception as error:  # a template may raise anything; jinja2's TemplateError most often
        raise UserError(
            f"{example.source}: the model's chat template refuses this row: {error}",
            "Bring the row's turns into the order that the template wants.",
        ) from None
    return text, spans


def _turn_span(through: str, start: int, content: str, example: Example, tokenizer: Any) -> tuple[int, int]:
    answer = content.strip()
    at = through.find(answer, start)
    if at < 0:
        raise _unlabelled(example, "the assistant's text is not found in the rendered turn")
    if _EMPTY_THINKING.fullmatch(through[start:at]):
        start = at
    elif through[start:at].strip():
        raise _unlabelled(example, f"the template puts {through[start:at]!r} between prompt and answer")
    stop = at + len(answer)
    tail = through[stop:]
    found = [(tail.find(token), len(token)) for token in tokenizer.all_special_tokens if token in tail]
    found += [
        (tail.find(str(token)), len(str(token)))
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and str(token) in tail
    ]
    if found:
        position, length = min(found)
        return start, stop + position + length
    return start, stop + len(tail.rstrip())


def _unlabelled(example: Example, why: str) -> UserError:
    return UserError(
        f"{example.source}: this row cannot be labelled exactly: {why}.",
        "Take the row out, or use a model whose chat template renders every turn the same way.",
    )


def encode_all(
    examples: list[Example], tokenizer: Any, max_length: int, progress: Progress = lambda share, text: None
) -> tuple[list[Encoded], list[Encoded]]:
    """`(kept, too_long)`: every row encoded, those longer than `max_length` tokens apart."""
    rows = []
    for number, example in enumerate(examples):
        rows.append(encode(example, tokenizer))
        progress(number / len(examples), example.source)
    kept = [row for row in rows if len(row.ids) <= max_length]
    return kept, [row for row in rows if len(row.ids) > max_length]


def stop_ids(rows: list[Encoded]) -> list[int]:
    """The ids that end an assistant turn, most frequent first: what the model must stop on when it is served."""
    ends: dict[int, int] = {}
    for row in rows:
        following = np.append(row.mask[1:], False)
        for token in row.ids[row.mask & ~following].tolist():
            ends[token] = ends.get(token, 0) + 1
    return sorted(ends, key=lambda token: -ends[token])

"""What a run is verified on: rows that training did not see, and texts that tokenizers disagree on.

The run keeps them in a small file, so that they are neither read nor encoded again.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, starmap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from common.data.dataset import Dataset, Example, first_texts
from common.data.encode import Encoded, Encoder
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import paired
from common.data.sources import data_of, encoder_of
from common.data.truncation import FilteredRows, filter_by_length
from common.documents import read_json
from common.errors import UserError
from common.files import atomic_write
from common.llama_cpp.server import for_llama_cpp
from common.model_files import tokenize
from common.models.sentencepiece import HARD_TEXTS
from common.option_sources import options_over
from common.recipe import Recipe
from common.run_record import Run

_ROWS = 32
_TOKENS = 500_000  # of all rows together, so that the file stays below some 10 MB
_TEXT = 20_000  # characters of the data


@dataclass(frozen=True)
class Prompt:
    """The prompt of a row: its messages before the last answer, and what training saw of them."""

    row: Encoded
    messages: list[dict[str, Any]]  # as llama.cpp takes them
    tools: list[dict[str, Any]]
    text: str  # of the complete row
    length: int  # tokens of the row that are the prompt
    bos: bool  # whether the row starts with a BOS that the template does not write
    plain: bool = False  # whether a model that thinks is asked not to, as the row has no reasoning

    @property
    def settings(self) -> dict[str, bool]:
        """For the chat template."""
        return {"enable_thinking": False, "thinking": False} if self.plain else {}

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.row.ids[: self.length].tolist()
        return ids

    @property
    def text_ids(self) -> list[int]:
        """The ids of `text`, BOS left out."""
        ids: list[int] = self.row.ids[self.bos :].tolist()
        return ids


@dataclass(frozen=True)
class Cases:
    rows: list[Encoded]  # as in training, none longer than the recipe's limit
    held_out: bool  # whether training has not seen the rows
    texts: list[str]
    prompts: list[Prompt]  # of those rows that are chats and complete


_Number = Annotated[int, Field(ge=0, lt=2**31)]


class _KeptRow(BaseModel):
    source: str
    ids: list[_Number]
    labels: list[_Number]  # positions


class _KeptPrompt(BaseModel):
    row: _Number
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    text: str
    length: _Number
    bos: bool
    plain: bool = False


class _KeptCases(BaseModel):
    """The file that the run keeps."""

    held_out: bool
    texts: list[str]
    rows: list[_KeptRow]
    prompts: list[_KeptPrompt]

    @model_validator(mode="after")
    def _in_range(self) -> "_KeptCases":
        if any(label >= len(row.ids) for row in self.rows for label in row.labels):
            raise ValueError("a label is beyond its row")
        if any(prompt.row >= len(self.rows) for prompt in self.prompts):
            raise ValueError("a prompt is of no row")
        return self


@dataclass(frozen=True)
class _Row:
    example: Example
    encoded: Encoded
    complete: bool  # False where the row was truncated


def make_cases(data: Dataset, valid: FilteredRows, train: FilteredRows, encoder: Encoder) -> Cases:
    """Up to 32 validation rows; training rows where there are none. Both are those of `data`, as encoded."""
    held_out, trained = (starmap(_Row, paired(*part)) for part in ((data.valid, valid.rows), (data.train, train.rows)))
    return _cases(data, held_out, trained, encoder)


def cases_of(run: Run, base: Path) -> Cases:
    """The cases that the run keeps, else (an older version's run) of its data. base: the model's folder.

    Raises UserError where the data would be needed and have changed, or are missing.
    """
    kept = read_cases(run.verify_cases)
    return encoded_again(run, base) if kept is None else kept


def encoded_again(run: Run, base: Path) -> Cases:
    """The cases of the run's data, whatever it keeps. Raises UserError where the data have changed, or are missing."""
    options, recipe = options_over(run.record.options, {}), run.recipe
    data, encoder = data_of(run, options), encoder_of(base, options, recipe)
    return _cases(data, _encoded(data.valid, encoder, recipe), _encoded(data.train, encoder, recipe), encoder)


def _cases(data: Dataset, held_out: Iterable[_Row], trained: Iterable[_Row], encoder: Encoder) -> Cases:
    unseen = _first(held_out)
    rows = unseen or _first(trained)
    return Cases(
        rows=[row.encoded for row in rows],
        held_out=bool(unseen),
        texts=list(dict.fromkeys([*HARD_TEXTS, *first_texts(chain(data.valid, data.train), _TEXT)])),
        prompts=[_prompt(row, encoder) for row in rows if row.complete and row.example.text is None],
    )


def _first(rows: Iterable[_Row]) -> list[_Row]:
    """As many as fit into the file."""
    kept: list[_Row] = []
    tokens = 0
    for row in islice(rows, _ROWS):
        tokens += len(row.encoded.ids)
        if kept and tokens > _TOKENS:
            break
        kept.append(row)
    return kept


def _encoded(examples: Iterable[Example], encoder: Encoder, recipe: Recipe) -> Iterator[_Row]:
    """Row by row, as training took them."""
    for example in examples:
        overflow = "drop" if recipe.overflow == "error" else recipe.overflow
        (rows,), _ = encode_parts([[example]], encoder, recipe.on_bad_row)
        fitted = filter_by_length(rows, recipe.max_length, overflow)
        yield from starmap(_Row, paired([example], fitted.rows))


def _prompt(row: _Row, encoder: Encoder) -> Prompt:
    _, conversation, example = encoder.encode_chat(row.example)
    last = conversation.turns[-1]
    ids = tokenize(encoder.tokenizer, conversation.text[: last.start])["input_ids"]
    bos = row.encoded.ids[: len(ids)].tolist() != ids
    before = conversation.messages[: len(conversation.messages) - len(example.messages) + last.message]
    messages = [for_llama_cpp(message) for message in before]
    plain = encoder.masking.thinking == "keep" and not conversation.think
    return Prompt(row.encoded, messages, list(example.tools), conversation.text, len(ids) + bos, bos, plain)


def write_cases(path: Path, cases: Cases) -> None:
    """`path`, in one step."""
    numbers = {id(row): number for number, row in enumerate(cases.rows)}
    content = {
        "held_out": cases.held_out,
        "texts": cases.texts,
        "rows": [
            {"source": row.source, "ids": row.ids.tolist(), "labels": np.flatnonzero(row.mask).tolist()}
            for row in cases.rows
        ],
        "prompts": [
            {
                "row": numbers[id(prompt.row)],
                "messages": prompt.messages,
                "tools": prompt.tools,
                "text": prompt.text,
                "length": prompt.length,
                "bos": prompt.bos,
                "plain": prompt.plain,
            }
            for prompt in cases.prompts
        ],
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_cases(path: Path) -> Cases | None:
    """None where the run keeps none, or they cannot be read."""
    try:
        kept = _KeptCases.model_validate(read_json(path, ""), strict=True)
    except (UserError, FileNotFoundError, ValidationError):  # it may be a stranger's
        return None
    rows = [_row(row) for row in kept.rows]
    prompts = [Prompt(**(vars(prompt) | {"row": rows[prompt.row]})) for prompt in kept.prompts]
    return Cases(rows, kept.held_out, kept.texts, prompts)


def _row(kept: _KeptRow) -> Encoded:
    ids = np.array(kept.ids, np.int32)
    labels = np.zeros(len(ids), bool)  # what a label weighed in training is nothing to compare models by
    labels[kept.labels] = True
    return Encoded(ids, labels, kept.source)

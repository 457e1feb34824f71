"""What a run is proven on: rows that training did not see, and texts that tokenizers disagree on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import run_record
from common.data.dataset import Dataset, Example, first_texts
from common.data.encode import Encoded, Encoder, load_tokenizer
from common.data.load import encoder_of
from common.data.truncation import filter_by_length
from common.llama_cpp.server import for_llama_cpp
from common.models.sentencepiece import PROBE
from common.options import Options
from common.recipe import Recipe


@dataclass(frozen=True)
class Prompt:
    """What a held-out row asks, the ids in which training saw that, and the whole row as text and ids, BOS left out."""

    example: Example
    messages: list[dict[str, Any]]
    ids: list[int]
    text: str
    text_ids: list[int]


@dataclass(frozen=True)
class Probes:
    """rows: encoded as in training, none longer than the recipe's limit. held_out: whether training has not seen them.

    texts: for the fused folder's `tokenizer`, control tokens among them. prompts: of the rows that are chats.
    """

    rows: list[Encoded]
    held_out: bool
    texts: list[str]
    prompts: list[Prompt]
    tokenizer: Any


def collect(run: Path, base: Path, data: Dataset, limit: int = 32) -> Probes:
    """Up to `limit` held-out rows, of the training rows where nothing was held out. `base` is the model's folder."""
    options, recipe = (
        Options.model_validate(run_record.read_run(run, "options")["options"]),
        run_record.read_recipe(run),
    )
    encoder = encoder_of(base, options, recipe)
    tokenizer = load_tokenizer(run / "fused")
    held_out = _fitting(data.valid, encoder, recipe, limit)
    kept = held_out or _fitting(data.train, encoder, recipe, limit)
    prompts = [_prompt(row, encoded, encoder) for row, encoded, whole in kept if whole and row.text is None]
    texts = list(dict.fromkeys([*PROBE, *first_texts([*data.valid, *data.train], 20_000)]))
    control = "".join(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)[:2000]
    if control:
        texts.append(f"a{control}b")
    return Probes([encoded for _, encoded, _ in kept], bool(held_out), texts, prompts, tokenizer)


def _fitting(
    examples: list[Example], encoder: Encoder, recipe: Recipe, limit: int
) -> list[tuple[Example, Encoded, bool]]:
    """As training took them: `(row, its tokens, whether they are all of it)`."""
    found: list[tuple[Example, Encoded, bool]] = []
    for example in examples:
        overflow: Literal["drop", "truncate"] = "truncate" if recipe.overflow == "truncate" else "drop"
        fitted = filter_by_length([encoder(example)], recipe.max_length, overflow)
        found += [(example, row, not fitted.truncated) for row in fitted.rows]
        if len(found) == limit:
            break
    return found


def _prompt(row: Example, encoded: Encoded, encoder: Encoder) -> Prompt:
    _, conversation, row = encoder.encode_chat(row)
    last = conversation.turns[-1]
    text = conversation.text[: last.start]
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    added = int(list(encoded.ids[: len(ids)]) != ids)  # a BOS that the template does not write
    before = conversation.messages[: len(conversation.messages) - len(row.messages) + last.message]
    whole = np.asarray(encoded.ids).tolist()
    messages = [for_llama_cpp(message) for message in before]
    return Prompt(row, messages, whole[: len(ids) + added], conversation.text, whole[added:])

"""A chat model that a backend computes, prompted as it was trained."""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backend import Backend, OutOfMemory
from common.data.chat_template import OPEN_BLOCK, ChatTemplate, Message, Refused
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.message_forms import fold_system
from common.errors import Refusal, UserError
from common.model_files import tokenize
from common.models.model_folder import ModelFolder
from common.sampling import Sampling, make_sampler

# (text, None) ..., then ("", "stop") or, cut at max_tokens, ("", "length")
Pieces = Generator[tuple[str, str | None], None, None]


@dataclass(frozen=True)
class ChatModel:
    """A model that answers. `answer(messages, sampling, tools)` streams; closing the iterator stops it.

    It raises Refusal for messages that the model cannot take.
    """

    name: str
    answer: Callable[[Sequence[Message], Sampling, Sequence[Any]], Pieces]


@dataclass(frozen=True)
class ChatFormat:
    """How a run's model is prompted, as it was in training."""

    folder: Path  # the model's, with its tokenizer
    template: str | None  # in place of the tokenizer's own
    stops: list[int]  # the ids that end trained turns
    think: bool  # whether it was trained with reasoning
    context: int = sys.maxsize  # tokens of prompt and answer together
    tokenizer: Any = None  # the folder's, where it is loaded already: Gemma's takes 250 MB


def adapt_messages(messages: list[Message], render: Callable[[list[Message]], str]) -> list[Message]:
    """The messages as training rendered them: a system turn that the template refuses or drops joins the user's."""
    other = fold_system(messages) if messages else None
    if other is None:
        return messages
    try:
        kept = messages[0]["content"].strip() in render(messages)
    except Refused:
        kept = False
    return messages if kept else other


def backend_chat_model(backend: Backend, form: ChatFormat, name: str, adapter: bool) -> ChatModel:
    """The model that is loaded in `backend`, with its adapter or without.

    Raises UserError where there is no chat template.
    """
    tokenizer = load_tokenizer(form.folder) if form.tokenizer is None else form.tokenizer
    if form.template is not None:
        tokenizer.chat_template = form.template
    if not tokenizer.chat_template:
        raise UserError(
            f"{form.folder} has no chat template, and was trained without.", "Chat with its GGUF in llama.cpp."
        )
    think = form.think
    thinking: Literal["off", "keep"] = "keep" if think else "off"
    chat_template, bos = ChatTemplate(tokenizer, thinking), Encoder(tokenizer, MaskingOptions(thinking=thinking)).bos
    stops = answer_stop_ids(form.folder, tokenizer, form.stops)

    def answer(messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Pieces:
        try:
            text = chat_template.prompt(
                adapt_messages(list(messages), lambda m: chat_template.prompt(m, tools, think)), tools, think
            )
        except Refused as error:
            raise Refusal(f"The chat template refuses these turns: {error}", "Change the turns.") from None
        ids = tokenize(tokenizer, text)["input_ids"]
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        remaining = form.context - len(ids)
        if remaining < 1:
            raise Refusal(
                f"These turns have {len(ids)} tokens, and --context is {form.context}.", "Give a larger --context."
            )
        limit = min(sampling.max_tokens, remaining)
        made = backend.generate(np.array(ids, np.int32), limit, stops, make_sampler(sampling), adapter)
        try:
            yield from _decoded(made, tokenizer, limit, OPEN_BLOCK.search(text))
        except OutOfMemory as error:
            raise Refusal(f"The answer does not fit into memory: {error}", "Give a lower --context.") from None

    return ChatModel(name, answer)


def _decoded(made: Iterator[int], tokenizer: Any, limit: int, opened_block: Any) -> Pieces:
    """Ids as text, in complete characters; a reasoning block that the prompt opened is part of the answer."""
    from tokenizers.decoders import DecodeStream

    if opened_block:
        yield f"{opened_block[1]}\n", None
    stream, count = DecodeStream(skip_special_tokens=True), 0
    for token in made:
        count += 1
        if piece := stream.step(tokenizer.backend_tokenizer, token):
            yield piece, None
    yield "", "length" if count == limit else "stop"


def answer_stop_ids(folder: Path, tokenizer: Any, trained: list[int]) -> list[int]:
    """The ids that end an answer: those of training, and those of the model before it."""
    return sorted({*trained, *ModelFolder(folder).end_ids, tokenizer.eos_token_id} - {None})

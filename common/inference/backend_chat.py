"""A chat model that a backend computes, prompted as it was trained."""

import re
import sys
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.backend import Backend, OutOfMemory
from common.data.chat_template import OPEN_BLOCK, TAGS, ChatTemplate, Message, Refused
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.message_forms import (
    fold_system,
    reasoning_as_trained,
    reasoning_of,
    tool_call_forms,
    with_inline_reasoning,
)
from common.errors import Refusal, UserError
from common.model_files import tokenize
from common.models.model_folder import ModelFolder
from common.sampling import Sampling, make_sampler

# (text, None) ..., then ("", "stop") or, cut at max_tokens, ("", "length")
Pieces = Generator[tuple[str, str | None], None, None]
# What llama.cpp's converter takes for control tokens besides those that a tokenizer calls special, and the tokens that
# it makes visible in Gemma 4's vocabulary. Source: does_token_look_special and visible_tokens in its `conversion`.
_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}


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
    """The messages as training rendered them.

    A system turn joins the user's where the template refuses or drops it, or writes it into a later turn.
    """
    other = fold_system(messages) if messages else None
    if other is None:
        return messages
    try:
        text = render(messages)
        at, user = text.find(messages[0]["content"].strip()), text.rfind(messages[1]["content"].strip())
        kept = at >= 0 and (user < 0 or at <= user)
    except Refused:
        kept = False
    return messages if kept else other


def hidden_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that an answer has no text of: control tokens, which llama.cpp's server leaves out too.

    The tags of reasoning are kept, so that it can be told from the answer.
    """
    kept, added = {*_VISIBLE, *TAGS, *TAGS.values()}, tokenizer.added_tokens_decoder.items()
    control = {number: str(token) for number, token in added if token.special or _CONTROL.fullmatch(str(token))}
    return {number: text for number, text in control.items() if text not in kept}


def without_hidden(tokenizer: Any) -> Callable[[str], str]:
    """A function that takes the tokens out of a text that no answer has."""
    texts = sorted(hidden_tokens(tokenizer).values(), key=len, reverse=True)
    return partial(re.compile("|".join(map(re.escape, texts)) or "(?!)").sub, "")


def _prompt(template: ChatTemplate, messages: list[Message], tools: Sequence[Any], think: bool) -> str:
    """The prompt as training rendered it: the first of the messages' forms that the template takes. Raises Refused."""

    def render(form: list[Message]) -> str:
        return template.prompt(form, tools, think)

    refusals = []
    for form in tool_call_forms(reasoning_as_trained(messages, template.has_think_tags, think)):
        try:
            return render(_with_reasoning(template, adapt_messages(form, render), tools))
        except Refused as error:
            refusals.append(error)
    raise refusals[0]


def _with_reasoning(template: ChatTemplate, messages: list[Message], tools: Sequence[Any]) -> list[Message]:
    """The messages with reasoning within the answers, where the template has no field for it and does not drop it."""
    reasoned = reasoning_of(messages)
    if not reasoned or template.takes_reasoning or template.own_block("q"):
        return messages
    answered = [*with_inline_reasoning(messages, reasoned, template.block), {"role": "assistant", "content": "q"}]
    text = template.render(answered, tools, False, True)
    kept = [number for number, said in reasoned.items() if template.block.format(said).strip() in text]
    return with_inline_reasoning(messages, kept, template.block)


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
    stops, hidden = answer_stop_ids(form.folder, tokenizer, form.stops), hidden_tokens(tokenizer)

    def answer(messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Pieces:
        try:
            text = _prompt(chat_template, list(messages), tools, think)
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
            yield from _decoded(made, tokenizer, hidden, limit, OPEN_BLOCK.search(text))
        except OutOfMemory as error:
            raise Refusal(f"The answer does not fit into memory: {error}", "Give a lower --context.") from None

    return ChatModel(name, answer)


def _decoded(made: Iterator[int], tokenizer: Any, hidden: Container[int], limit: int, opened_block: Any) -> Pieces:
    """Ids as text, in complete characters; a reasoning block that the prompt opened is part of the answer."""
    from tokenizers.decoders import DecodeStream

    if opened_block:
        yield f"{opened_block[1]}\n", None
    stream, count = DecodeStream(skip_special_tokens=False), 0
    for token in made:
        count += 1
        if token not in hidden and (piece := stream.step(tokenizer.backend_tokenizer, token)):
            yield piece, None
    yield "", "length" if count == limit else "stop"


def answer_stop_ids(folder: Path, tokenizer: Any, trained: list[int]) -> list[int]:
    """The ids that end an answer: those of training, and those of the model before it."""
    return sorted({*trained, *ModelFolder(folder).end_ids, tokenizer.eos_token_id} - {None})

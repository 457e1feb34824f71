"""Example -> Encoded: rendered by the model's chat template, with an exact mask of the label tokens."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.data.assistant_spans import REMEDY, Conversation, locate_turns
from common.data.chat_template import ChatTemplate
from common.data.dataset import Example
from common.data.tokens import TextTokenizer, Tokens
from common.data.tool_text import tools_as_text, uses_tools
from common.data.turn_edges import BadRow, Unlabeled
from common.errors import UserError
from common.model_files import open_tokenizer, tokenize
from common.option_fields import RecipeFields
from common.paths import user_path

TEMPLATES = Path(__file__).with_name("chat_templates")


@dataclass(frozen=True)
class MaskingOptions:
    """As the options of these names: train_on, thinking, and tools under a template that takes none."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    thinking: Literal["off", "keep"] = "off"
    tools: Literal["error", "drop", "system"] = "error"


def masking_of(options: RecipeFields) -> MaskingOptions:
    return MaskingOptions(options.train_on, options.thinking, options.tools)


@dataclass(frozen=True)
class Encoded:
    ids: np.ndarray  # [T] int32
    loss_weights: np.ndarray  # [T], of each token; 0: not a label. As bool where all labels weigh 1, to save memory
    source: str
    ends: tuple[int, ...] = ()  # the ids that end its trained turns
    notes: tuple[str, ...] = ()  # what was changed so that the template takes the row
    text: bool = False  # plain text, which may be cut anywhere
    control: tuple[str, ...] = ()  # the model's control tokens that stand in the text of its turns

    @property
    def mask(self) -> np.ndarray:
        """[T] bool: True where the token is a label."""
        return self.loss_weights > 0

    @property
    def label_tokens(self) -> int:
        return int(self.mask[1:].sum())  # nothing predicts the first token


def compact(weights: np.ndarray) -> np.ndarray:
    """`loss_weights` of `Encoded`, from float32."""
    return weights if np.any((weights != 0) & (weights != 1)) else weights > 0


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The folder's tokenizer; chat_template: a built-in one by name, or a file, in place of its own.

    Raises UserError where there is no tokenizer, it is not a fast one, or its vocabulary lacks a token that the given
    template writes.
    """
    tokenizer = open_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{folder}: its tokenizer ({type(tokenizer).__name__}) is not a fast one. Labels need its offsets.",
            "Choose a model whose folder has a tokenizer.json that transformers loads as a fast tokenizer.",
        )
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        named = tokenizer.chat_template
        tokenizer.chat_template = named.get("default") or next(iter(named.values()))
    if chat_template is not None:
        tokenizer.chat_template = _named_template(chat_template)
        known, template = tokenizer.get_vocab(), tokenizer.chat_template
        written = sorted(set(re.findall(r"<\|[\w▁]+\|>|<(?:start|end)_of_turn>", template)))
        if missing := [token for token in written if token not in known]:
            raise UserError(
                f"--chat-template {chat_template}: it writes {', '.join(missing)}, which the model's vocabulary lacks.",
                f"Choose one that fits: {', '.join(_fitting(known)) or 'no built-in one does; give a file'}.",
            )
    return tokenizer


def own_templates() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def _named_template(name: str) -> str:
    path = TEMPLATES / f"{name}.jinja" if name in own_templates() else user_path(name, "--chat-template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--chat-template {name}: neither a built-in template nor a readable file ({error}).",
            f"Built in: {', '.join(own_templates())}.",
        ) from None


def _fitting(vocabulary: dict[str, int]) -> list[str]:
    texts = {name: _named_template(name) for name in own_templates()}
    tokens = {name: re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", text) for name, text in texts.items()}
    return [name for name, written in tokens.items() if all(token in vocabulary for token in written)]


def template_hash(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def exported_template(tokenizer: Any, masking: MaskingOptions) -> str | None:
    """The chat template that serves the model as it was trained; None where it has none."""
    return ChatTemplate(tokenizer, masking.thinking).exported_template() if tokenizer.chat_template else None


class Encoder:
    """Encodes rows with one tokenizer; its chat template's quirks are looked for once."""

    def __init__(self, tokenizer: Any, masking: MaskingOptions) -> None:
        self.tokenizer, self.masking = tokenizer, masking
        self.template = ChatTemplate(tokenizer, masking.thinking) if tokenizer.chat_template else None
        self.unlabeled_reason = "prompt" if masking.train_on != "all" else "--train-on all: every token is learned"
        self.bos = tokenizer.bos_token_id if _adds_bos(tokenizer) else None
        self._text = TextTokenizer(tokenizer)

    def locate_turns(self, example: Example) -> Conversation:
        """The row as text with its assistant turns. Raises BadRow where they cannot be located exactly."""
        if self.template is None:
            raise UserError(
                f"{example.source}: the model has no chat template, so chat rows cannot be rendered.",
                f"Use its instruction-tuned (-it, -Instruct) version, or --chat-template NAME or FILE "
                f"(built-in ones that fit: {', '.join(_fitting(self.tokenizer.get_vocab())) or 'none'}).",
            )
        return locate_turns(example, self.template)

    def __call__(self, example: Example) -> Encoded:
        """Token ids and loss weights. Raises BadRow where the row cannot be labeled exactly."""
        if example.text is None:
            return self.encode_chat(example)[0]
        (tokens,) = self._text.tokens([example.text])
        return self._plain(example, tokens)

    def encode_batch(self, examples: Sequence[Example]) -> list[Encoded | BadRow]:
        """Of each row what `__call__` returns, or the BadRow that it raises. The tokenizer is called once for all."""
        located = [self._located(example) for example in examples]
        texts = [found.text or "" for found in located if isinstance(found, Example | Conversation)]
        tokens = iter(self._text.tokens(texts))
        return [self._encoded(example, found, tokens) for example, found in zip(examples, located, strict=True)]

    def _located(self, example: Example) -> Example | Conversation | BadRow | None:
        """The row itself where it is plain text, else its turns; None where it must be changed first."""
        if example.text is not None:
            return example
        try:
            return None if self.without_tools(example) else self.locate_turns(example)
        except BadRow as why:
            return why

    def _encoded(
        self, example: Example, found: Example | Conversation | BadRow | None, tokens: Iterator[Tokens]
    ) -> Encoded | BadRow:
        if isinstance(found, BadRow):
            return found
        try:
            if isinstance(found, Example):
                return self._plain(example, next(tokens))
            if found:
                with suppress(Unlabeled):
                    return self._chat(example, found, next(tokens))
            return self(example)
        except BadRow as why:
            return why

    def encode_chat(self, example: Example) -> tuple[Encoded, Conversation, Example]:
        """A chat row's ids and loss weights, its text with the turns, and the row as it was rendered.

        Spaces around its answers may have been stripped, and its tools written as text. Raises BadRow as `__call__`.
        """
        if changed := self.without_tools(example):
            row, conversation, rendered = self.encode_chat(changed)
            where = "left out" if self.masking.tools == "drop" else "written as text"
            note = f"tools {where}, which the template does not take (--tools {self.masking.tools})"
            return replace(row, notes=(note, *row.notes)), conversation, rendered
        conversation = self.locate_turns(example)
        try:
            (tokens,) = self._text.tokens([conversation.text])
            return self._chat(example, conversation, tokens), conversation, example
        except Unlabeled as why:
            stripped = replace(example, messages=tuple({**m, "content": _stripped(m)} for m in example.messages))
            if stripped != example:  # a leading line break may merge with the prompt's last token
                row, conversation, stripped = self.encode_chat(stripped)
                return replace(row, notes=(*row.notes, "spaces around answers taken off")), conversation, stripped
            raise BadRow(example.source, f"this row cannot be labeled exactly: {why}.", REMEDY) from None

    def without_tools(self, example: Example) -> Example | None:
        """The row as --tools asks for it, where the template takes no tools and that is another row."""
        mode = self.masking.tools
        if mode == "error" or not uses_tools(example) or self.template is None or self.template.takes_tools:
            return None
        if mode == "system":
            return tools_as_text(example)
        return replace(example, tools=()) if example.tools else None

    def _chat(self, example: Example, conversation: Conversation, tokens: Tokens) -> Encoded:
        weights, stops = np.zeros(len(tokens.ids), np.float32), []
        trained, turns = self.trained(example, conversation), conversation.turns
        spans = self._text.spans(tokens, [(turn.start, turn.stop, turn.end) for turn in turns])
        for turn, (first, stop, end) in zip(turns, spans, strict=True):
            if turn.message in trained:
                weights[first:end] = trained[turn.message]
                if turn.end > turn.stop:
                    stops.append(int(tokens.ids[end - 1]))
                    called = example.messages[turn.message].get("tool_calls")
                    if stops[-1] in tokens.ids[first:stop] and not called:
                        where = f"turn {turn.message + 1}"
                        raise Unlabeled(f"{where} has the end-of-turn token in its text, and would teach a stop there")
        weights = self._within_generation(conversation, weights, tokens, spans)
        if self.masking.train_on == "all":
            weights[:] = example.weight
            for turn, (first, _, end) in zip(turns, spans, strict=True):
                weights[first:end] = trained.get(turn.message, 0)
        weighted = any(weight != 1 for weight in (example.weight, *trained.values()))
        found, control = compact(weights) if weighted else weights > 0, self._control(example)
        row = Encoded(tokens.ids, found, example.source, tuple(stops), conversation.notes, control=control)
        return self._with_bos(row)

    def _control(self, example: Example) -> tuple[str, ...]:
        if self.template is None:
            return ()
        found = {token for message in example.messages for token in self.template.special.findall(message["content"])}
        return tuple(sorted(found))

    def trained(self, example: Example, conversation: Conversation) -> dict[int, float]:
        """The indices of the messages whose turns are trained, and what their tokens weigh in the loss."""
        turns = [turn.message for turn in conversation.turns]
        selected = turns[-1:] if self.masking.train_on == "last" else turns
        given = ((number, example.messages[number]) for number in selected if number not in conversation.unreasoned)
        return {n: example.weight * message.get("weight", 1.0) for n, message in given if message.get("train", True)}

    def _within_generation(
        self, conversation: Conversation, weights: np.ndarray, tokens: Tokens, spans: list[tuple[int, int, int]]
    ) -> np.ndarray:
        """Those within the template's own generation tags, where it has them, and at the end of each turn; others 0."""
        if not conversation.generation_spans:
            return weights
        allowed, offsets = np.zeros(len(weights), bool), self._text.offsets(tokens)
        for start, end in conversation.generation_spans:
            allowed[offsets.before(start) : offsets.before(end)] = True
        for _, stop, end in spans:
            allowed[stop:end] = True
        return np.where(allowed, weights, np.float32(0))

    def _plain(self, example: Example, tokens: Tokens) -> Encoded:
        """Plain text: every token is a label, and so is the end token; with BOS where the tokenizer adds it."""
        stop = self.tokenizer.eos_token_id
        if stop is None:
            raise UserError(f"{example.source}: the tokenizer has no end-of-text token.", "Use chat rows.")
        ids = np.append(tokens.ids, np.int32(stop))
        weights = compact(np.full(len(ids), example.weight, np.float32))
        try:
            return self._with_bos(Encoded(ids, weights, example.source, (stop,), text=True))
        except Unlabeled as why:
            raise BadRow(example.source, f"{why}.", "Remove one of them.") from None

    def _with_bos(self, row: Encoded) -> Encoded:
        """The row with exactly one BOS, where there is one: llama.cpp, too, adds it where a prompt lacks it."""
        bos = self._text.bos
        ids, weights = row.ids, row.loss_weights
        if bos is None:
            return row
        if self.bos is not None and ids[0] != bos:
            ids, weights = np.insert(ids, 0, bos), np.insert(weights, 0, 0)
        if len(ids) > 1 and ids[0] == ids[1] == bos and bos != self._text.eos:
            raise Unlabeled("it starts with two BOS tokens")
        if ids[0] == bos:
            weights[0] = 0  # in place: the row was just made
        return row if ids is row.ids else replace(row, ids=ids, loss_weights=weights)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenize(tokenizer, "a", add_special_tokens=True)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _stripped(message: dict[str, Any]) -> str:
    return message["content"].strip() if message["role"] == "assistant" else message["content"]

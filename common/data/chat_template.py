"""A model's chat template: prompts as the exported model is served, thinking on or off, the same on every day."""

import json
import re
from datetime import datetime
from functools import cached_property
from typing import Any

Message = dict[str, Any]
# Some templates write today's date: the same recipe would have other tokens tomorrow.
_DAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
PLACEHOLDER = "qTWINTUNE{}q{}q{}"
HELLO: Message = {"role": "user", "content": "q"}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "qTWINTUNEq",
        "description": "q",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "q"}}},
    },
}
# How model families write the start and the end of a thinking block.
_TAGS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}
_PLAIN = {"role", "content", "train", "weight"}  # keys of a message whose rendering is known by roles and placeholders
_SHAPES = 1000  # of conversations that are remembered
_OPEN, _SHUT = ("(?:" + "|".join(map(re.escape, tags)) + ")" for tags in (_TAGS, _TAGS.values()))
EMPTY_BLOCK = re.compile(rf"\s*(?:{_OPEN}\s*)?{_SHUT}\s*")
OPEN_BLOCK = re.compile(rf"({_OPEN})\s*\Z")
# What a generation prompt may have and a finished turn may lack: a thinking block, opened or empty, or its end.
THINKING_REST = re.compile(rf"\s*{_OPEN}?\s*{_SHUT}?\s*")


def closing(opened: str) -> str:
    """The text that closes a thinking block which `opened` has started."""
    return f"\n{_TAGS[opened]}\n\n" if opened == "<think>" else _TAGS[opened]


class Refused(Exception):
    """Why a chat template does not render what it is given."""


class ChatTemplate:
    """A tokenizer's chat template, its quirks looked for once. `thinking`: off or keep."""

    def __init__(self, tokenizer: Any, thinking: str) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self.source = _TODAY.sub(lambda call: json.dumps(_DAY.strftime(call[2])), str(tokenizer.chat_template))
        self.has_generation_tags = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.source))
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.edges: dict[tuple[object, ...], list[Any]] = {}  # what it writes around turns, by their kind
        self._masked: dict[tuple[object, ...], str] = {}
        self._tokens = dict(tokenizer.special_tokens_map)
        self._suffix: str | None = None
        self._no_tools: list[Any] | None = None
        try:
            self.render([HELLO], (), False, False)
        except Refused:  # some templates loop over the tools even where there are none
            self._no_tools = []

    @cached_property
    def takes_tools(self) -> bool:
        """Whether it writes the definition of a tool."""
        name = _TOOL["function"]["name"]
        try:
            return name in self.render([HELLO], (_TOOL,), True, False)
        except Refused:
            return False

    def render(self, messages: list[Message], tools: Any, prompt: bool, think: bool) -> str:
        """The messages as text. prompt: with the generation prompt behind them. Raises Refused."""
        return self._rendered(messages, tools, think, add_generation_prompt=prompt)[0]

    def _rendered(self, messages: list[Message], tools: Any, think: bool, **settings: bool) -> tuple[str, Any]:
        """As the tokenizer's own apply_chat_template renders them, and the spans within generation tags, if asked for.

        That method takes twice the time of the template itself.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages:
            raise Refused("a conversation without a turn")
        plain = [{key: value for key, value in m.items() if value is not None} for m in self._with_reasoning(messages)]
        given = self._tokens | self._variables(think) | settings
        given |= {"tools": list(tools) or self._no_tools, "chat_template": self.source}
        try:
            texts, spans = render_jinja_template([plain], **given)
        except Exception as error:  # a template may raise anything; jinja2's TemplateError most often
            raise Refused(str(error)) from None
        return texts[0], spans

    def masked(self, messages: list[Message], tools: Any, think: bool) -> str:
        """The messages, which have placeholders for what they say, as text. Raises Refused."""
        turns = (think, *((message["role"], message["content"]) for message in messages))
        plain = all(message.keys() <= _PLAIN and str(message["content"])[:9] == PLACEHOLDER[:9] for message in messages)
        if tools or not plain:
            return self.render(messages, tools, False, think)
        if turns not in self._masked:
            if len(self._masked) >= _SHAPES:
                self._masked.clear()
            self._masked[turns] = self.render(messages, (), False, think)
        return self._masked[turns]

    def generation_spans(
        self, messages: list[Message], tools: Any, think: bool, rendered: str
    ) -> tuple[tuple[int, int], ...] | None:
        """Characters of `rendered` within the template's own `{% generation %}` tags; None without such tags.

        Raises Refused.
        """
        if not self.has_generation_tags:
            return None
        text, spans = self._rendered(messages, tools, think, return_assistant_tokens_mask=True)
        return tuple(spans[0]) if text == rendered else None

    def _with_reasoning(self, messages: list[Message]) -> list[Message]:
        """The reasoning under each name that a template may look for."""
        return [
            {**m, "reasoning": reasoning, "thinking": reasoning} if (reasoning := m.get("reasoning_content")) else m
            for m in messages
        ]

    def _variables(self, think: bool) -> dict[str, Any]:
        return {"enable_thinking": think, "thinking": think, "date_string": f"{_DAY:%d %b %Y}"}

    def prompt(self, messages: list[Message], tools: Any, think: bool) -> str:
        """The generation prompt as the exported model is served."""
        return self.render(messages, tools, True, think) + ("" if think else self.suffix)

    @property
    def suffix(self) -> str:
        """What thinking off adds to the generation prompt: an empty block, or the end of one that the prompt opens."""
        if self._suffix is None:
            placeholder = PLACEHOLDER.format("", 1, "c")
            before = self.render([HELLO], (), True, False)
            after = self.render([HELLO, {"role": "assistant", "content": placeholder}], (), False, False)
            between = after[len(before) : after.find(placeholder)] if after.startswith(before) else ""
            opened = OPEN_BLOCK.search(before)
            self._suffix = between if EMPTY_BLOCK.fullmatch(between) else closing(opened[1]) if opened else ""
        return self._suffix

    def exported_template(self) -> str:
        """The template that serves the model as it was trained: with thinking off, it cannot be switched on."""
        template = str(self.tokenizer.chat_template)
        suffix = self.suffix if self.thinking == "off" else ""
        for name in ("thinking", "enable_thinking"):
            if re.search(rf"""(?<![\w.'"]){name}(?![\w'"])""", template):
                value = f"{{%- set {name} = {str(self.thinking == 'keep').lower()} -%}}"
                if self.thinking == "keep":  # on, as in training, unless the server says otherwise
                    value = f"{{%- if {name} is not defined -%}}{value}{{%- endif -%}}"
                template = value + template
        if suffix:
            template += f"{{%- if add_generation_prompt -%}}{{{{- {json.dumps(suffix)} -}}}}{{%- endif -%}}"
        return template

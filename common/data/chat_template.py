"""A chat template at work: prompts as the exported model is served, thinking on or off, the same on every day."""

import json
import re
from datetime import datetime
from typing import Any

Message = dict[str, Any]
# Some templates write today's date otherwise: the same recipe would be other tokens tomorrow.
_DAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
MARK = "qTWINTUNE{}q{}q{}"
HELLO: Message = {"role": "user", "content": "q"}
# How families write where thinking begins and ends.
_TAGS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}
_OPEN, _SHUT = ("(?:" + "|".join(map(re.escape, tags)) + ")" for tags in (_TAGS, _TAGS.values()))
EMPTY_BLOCK = re.compile(rf"\s*(?:{_OPEN}\s*)?{_SHUT}\s*")
OPEN_BLOCK = re.compile(rf"({_OPEN})\s*\Z")
# What a generation prompt may have, and a finished turn not: a thinking block, opened or empty, or the end of one.
THINKING_REST = re.compile(rf"\s*{_OPEN}?\s*{_SHUT}?\s*")


def closed(opened: str) -> str:
    return f"\n{_TAGS[opened]}\n\n" if opened == "<think>" else _TAGS[opened]


class Renderer:
    """A tokenizer's chat template with its quirks found once. `thinking`: off or keep."""

    def __init__(self, tokenizer: Any, thinking: str) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self.template = _TODAY.sub(lambda call: json.dumps(_DAY.strftime(call[2])), str(tokenizer.chat_template))
        self.marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.template))
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._suffix: str | None = None
        self._no_tools: list[Any] | None = None
        try:
            self.render([HELLO], (), False, False)
        except Exception:  # some templates loop over tools that are not there
            self._no_tools = []

    def render(self, messages: list[Message], tools: Any, prompt: bool, think: bool) -> str:
        return self.tokenizer.apply_chat_template(
            self._said(messages),
            chat_template=self.template,
            tools=list(tools) or self._no_tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **self._variables(think),
        )

    def marks(
        self, messages: list[Message], tools: Any, think: bool, rendered: str
    ) -> tuple[tuple[int, int], ...] | None:
        """What lies between the template's `{% generation %}` marks, in characters of `rendered`; None without."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.marked:
            return None
        texts, spans = render_jinja_template(
            [[{k: v for k, v in message.items() if v is not None} for message in self._said(messages)]],
            tools=list(tools) or self._no_tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            **self._variables(think),
        )
        return tuple(spans[0]) if texts[0] == rendered else None

    def _said(self, messages: list[Message]) -> list[Message]:
        """Thoughts under each name that a template may look for."""
        return [
            {**m, "reasoning": thought, "thinking": thought} if (thought := m.get("reasoning_content")) else m
            for m in messages
        ]

    def _variables(self, think: bool) -> dict[str, Any]:
        day = f"{_DAY:%d %b %Y}"
        return {"enable_thinking": think, "thinking": think, "date_string": day}

    def prompt(self, messages: list[Message], tools: Any, think: bool) -> str:
        """The generation prompt as the exported model is served."""
        return self.render(messages, tools, True, think) + ("" if think else self.suffix)

    @property
    def suffix(self) -> str:
        """What thinking off adds to the generation prompt: an empty block, or the end of one that stands open."""
        if self._suffix is None:
            mark = MARK.format("", 1, "c")
            before = self.render([HELLO], (), True, False)
            after = self.render([HELLO, {"role": "assistant", "content": mark}], (), False, False)
            between = after[len(before) : after.find(mark)] if after.startswith(before) else ""
            opened = OPEN_BLOCK.search(before)
            self._suffix = between if EMPTY_BLOCK.fullmatch(between) else closed(opened[1]) if opened else ""
        return self._suffix

    def exported_template(self) -> str:
        """The template that serves as training saw it: with thinking off nobody can switch it on by mistake."""
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

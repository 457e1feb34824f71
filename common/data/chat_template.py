"""A model's chat template: prompts as the exported model is served, thinking on or off, the same on every day."""

import json
import re
from datetime import datetime
from functools import cached_property
from typing import Any

Message = dict[str, Any]
# Some templates write today's date: the same recipe would have other tokens tomorrow.
_DAY = datetime(2024, 7, 26)
_DATE = f"{_DAY:%d %b %Y}"
# By these llama.cpp's server has templates keep the reasoning of earlier turns. In training they are not defined.
_NOT_GIVEN = ("preserve_thinking", "clear_thinking", "truncate_history_thinking", "drop_thinking")
_ON = "enable_thinking if enable_thinking is defined else true"  # llama.cpp's server knows that name alone
# As `fold_system` does it.
_FOLD_SYSTEM = (
    "{%- if messages | length > 1 and messages[0].role == 'system' and messages[1].role == 'user' -%}"
    "{%- set messages = [{'role': 'user', 'content': messages[0].content + '\n\n' + messages[1].content}]"
    " + messages[2:] -%}{%- endif -%}"
)
# Around what is added to an exported template: a fused model that is trained again has the template of before.
_MARKED = "{{#- as trained -#}}{}{{#- until here -#}}"
_AS_TRAINED = re.compile(r"\{#- as trained -#\}.*?\{#- until here -#\}", re.DOTALL)
PLACEHOLDER = "qTWINTUNE{}q{}q{}"
HELLO: Message = {"role": "user", "content": "q"}
_CALL: dict[str, Any] = {"id": "q00000001", "type": "function", "function": {"name": "q", "arguments": {"q": "q"}}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "qTWINTUNEq",
        "description": "q",
        "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "q"}}},
    },
}
# How model families write the start and the end of a thinking block.
TAGS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "[THINK]": "[/THINK]",
}
_PLAIN = {"role", "content", "train", "weight"}  # keys of a message whose rendering is known by roles and placeholders
_SHAPES = 1000  # of conversations that are remembered
_REASONING = PLACEHOLDER.format("", 1, "r")
_OPEN, _SHUT = ("(?:" + "|".join(map(re.escape, tags)) + ")" for tags in (TAGS, TAGS.values()))
EMPTY_BLOCK = re.compile(rf"\s*(?:{_OPEN}\s*)?{_SHUT}\s*")
OPEN_BLOCK = re.compile(rf"({_OPEN})\s*\Z")
# What a generation prompt may have and a finished turn may lack: a thinking block, opened or empty, or its end.
THINKING_REST = re.compile(rf"\s*{_OPEN}?\s*{_SHUT}?\s*")
# A block with reasoning in it.
_FULL_BLOCK = re.compile(rf"{_OPEN}\s*{_REASONING}\s*{_SHUT}")


def has_think_tags(template: str) -> bool:
    """Whether its reasoning stands between these; then the first tag may be lacking in a row."""
    return "<think>" in template or "</think>" in template


def closing(opened: str) -> str:
    """The text that closes a thinking block which `opened` has started."""
    return f"\n{TAGS[opened]}\n\n" if opened == "<think>" else TAGS[opened]


def _is_plain(message: Message) -> bool:
    """Whether the message is rendered the same wherever role and text are the same, and its text is a placeholder."""
    content = message["content"]
    placeholder = isinstance(content, str) and (content.startswith(PLACEHOLDER[:9]) or content == HELLO["content"])
    return placeholder and message.keys() <= _PLAIN


def _as_given(message: Message) -> Message:
    """The message as apply_chat_template gives it to a template: no None, reasoning under each name it may have."""
    if None in message.values():
        message = {key: value for key, value in message.items() if value is not None}
    if (reasoning := message.get("reasoning_content")) is None:
        return message
    return {"thinking": reasoning, **message} | ({"reasoning": reasoning} if reasoning else {})


def _strftime(template: str) -> str:
    """The function that gives a template the date, in its own language, for the directives that the template names."""
    given = {name: _DAY.strftime(name) for name in re.findall(r"%-?[A-Za-z]", template)}
    replaced = "".join(f" | replace({json.dumps(name)}, {json.dumps(text)})" for name, text in given.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro -%}}"


class Refused(Exception):
    """Why a chat template does not render what it is given."""


class ChatTemplate:
    """A tokenizer's chat template, its quirks looked for once. `thinking`: off or keep."""

    def __init__(self, tokenizer: Any, thinking: str) -> None:
        self.tokenizer, self.thinking = tokenizer, thinking
        self.source = _AS_TRAINED.sub("", str(tokenizer.chat_template))
        self.has_think_tags = has_think_tags(self.source)
        self.has_generation_tags = bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.source))
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self.edges: dict[tuple[object, ...], list[Any]] = {}  # what it writes around turns, by their kind
        self._known: dict[tuple[object, ...], str] = {}  # rendered messages of placeholders
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

    @cached_property
    def block(self) -> str:
        """How reasoning is written at the start of an answer, where the template has no field for it."""
        own = "[THINK]" in self.source and not self.has_think_tags
        return "[THINK]{}[/THINK]" if own else "<think>\n{}\n</think>\n\n"

    @cached_property
    def takes_reasoning(self) -> bool:
        """Whether it writes the reasoning of an answer from a field of its own."""
        return _REASONING in self._with_reasoning({"content": "q"})

    @cached_property
    def _block_of_calls(self) -> str:
        """The block in which it writes the reasoning before a tool's call; "" where it writes none."""
        forms = ({"content": "", "tool_calls": [_CALL]}, {"content": None, "tool_calls": [_CALL]})
        blocks = (_FULL_BLOCK.search(self._with_reasoning(form)) for form in forms)
        return next((block[0] for block in blocks if block), "")

    @cached_property
    def folds_system(self) -> bool:
        """Whether rows are trained with their system text in the first user turn.

        It takes no system role, or writes its text before the last user turn.
        """
        turns = [{"role": role, "content": f"q{role}q"} for role in ("system", "user", "assistant")] + [HELLO]
        try:
            self.render(turns[1:], (), True, False)
        except Refused:
            return False
        try:
            text = self.render(turns, (), True, False)
        except Refused:
            return True
        return not 0 <= text.find("qsystemq") < text.find("quserq")

    def _with_reasoning(self, answer: dict[str, Any]) -> str:
        message = {"role": "assistant", "reasoning_content": _REASONING, **answer}
        try:
            return self.render([HELLO, message], (), False, True)
        except Refused:
            return ""

    def own_block(self, reasoning: str) -> str:
        """The reasoning as the template writes it before calls alone, so in tags of its own; "" where it does not."""
        return "" if self.takes_reasoning else self._block_of_calls.replace(_REASONING, reasoning)

    def render(self, messages: list[Message], tools: Any, prompt: bool, think: bool) -> str:
        """The messages as text. prompt: with the generation prompt behind them. Raises Refused.

        The text of messages that have placeholders for what they say is remembered.
        """
        if tools or not all(map(_is_plain, messages)):
            return self._rendered(messages, tools, prompt, think)
        shape = (prompt, think, *((message["role"], message["content"]) for message in messages))
        if shape not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[shape] = self._rendered(messages, (), prompt, think)
        return self._known[shape]

    def _rendered(self, messages: list[Message], tools: Any, prompt: bool, think: bool) -> str:
        if not messages:
            raise Refused("a conversation without a turn")
        given, compiled = self._given(messages, tools, think), self._compiled
        try:
            text: str = compiled.render(given, add_generation_prompt=prompt)
        except Exception as error:  # a template may raise anything; jinja2's TemplateError most often
            raise Refused(str(error)) from None
        return text

    @property
    def _compiled(self) -> Any:
        """The template as transformers compiles it, once. Raises Refused.

        Its render_jinja_template takes half as long again, to turn all it is given into JSON's types; rows have no
        others.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(self.source)
        except Exception as error:  # as above
            raise Refused(str(error)) from None

    def generation_spans(
        self, messages: list[Message], tools: Any, think: bool, rendered: str
    ) -> tuple[tuple[int, int], ...] | None:
        """Characters of `rendered` within the template's own `{% generation %}` tags; None without such tags.

        Raises Refused.
        """
        if not self.has_generation_tags:
            return None
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        given, compiled = self._given(messages, tools, think), self._compiled
        try:
            text, spans = _render_with_assistant_indices(compiled, add_generation_prompt=False, **given)
        except Exception as error:  # as above
            raise Refused(str(error)) from None
        return tuple(spans) if text == rendered else None

    def _given(self, messages: list[Message], tools: Any, think: bool) -> dict[str, Any]:
        """What the template is given."""
        names = {"enable_thinking": think, "thinking": think, "date_string": _DATE, "strftime_now": _DAY.strftime}
        row = {"messages": list(map(_as_given, messages)), "documents": None, "tools": list(tools) or self._no_tools}
        return self._tokens | names | row

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
        """The template that serves the model as it was trained.

        With thinking off it cannot be switched on; else it can be switched off. llama.cpp's server gives templates
        today's date, and has them keep the reasoning of earlier turns.
        """
        template = self.source
        keep, head = self.thinking == "keep", ""
        values = {"thinking": _ON if keep else "false", "enable_thinking": json.dumps(keep)}
        values |= {"date_string": json.dumps(_DATE)} | dict.fromkeys(_NOT_GIVEN, "not_given")
        for name, value in values.items():
            if re.search(rf"""(?<![\w.'"]){name}(?![\w'"])""", template):
                setting = f"{{%- set {name} = {value} -%}}"
                if keep and name.endswith("thinking") and name not in _NOT_GIVEN:  # unless the server says otherwise
                    setting = f"{{%- if {name} is not defined -%}}{setting}{{%- endif -%}}"
                head += setting
        if "strftime_now" in template:
            head += _strftime(template)
        if self.folds_system:
            head += _FOLD_SYSTEM
        asked = "add_generation_prompt" + (" and enable_thinking is defined and not enable_thinking" if keep else "")
        tail = f"{{%- if {asked} -%}}{{{{- {json.dumps(self.suffix)} -}}}}{{%- endif -%}}" if self.suffix else ""
        return template.join(_MARKED.format(part) if part else "" for part in (head, tail))

"""The Modelfile that Ollama makes a model from: its prompt template found in the chat template that training used.

The chat template is rendered with marks in place of what is said, in conversations of several lengths, with a system
text and without. What stands between the marks is written as a Go template, which is then executed on other
conversations: only what gives the chat template's prompts to the letter is kept.
Source: Ollama's docs/modelfile.md, parser/parser.go and template/template.go.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from common.data.chat_template import PLACEHOLDER, ChatTemplate, Message
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.message_forms import fold_system, split_thinking
from common.data.turn_edges import common_prefix
from common.export.go_template import execute
from common.files import atomic_write
from common.models.model_folder import ModelFolder

Prompt = Callable[[list[Message]], str]
Thinking = Literal["off", "keep"]
_CONTEXT = 8192  # what Ollama may take memory for unless told otherwise; less where the model has less
_TEMPERATURE = 0.7
_SAID = (
    ("system", "Answer briefly."),
    ("user", "What is 2 + 2?"),
    ("assistant", 'Four.\n\n- "Four", I say: {{ .Content }} isn\'t <b>it</b>.'),
    ("user", "二に二を足すと？😀"),
    ("assistant", "四"),
    ("user", "system"),
    ("assistant", "user\n\nassistant"),
    ("user", "x"),
)
_ALTERNATING = re.compile(r"(system )?(user assistant )*user")
_PADDED = {role: f" \n{role} said\n\n " for role in ("system", "user", "assistant")}

_THOUGHT = ("Why?", "<think>\nWell.\n</think>\n\nIt is so.", "Why?")


class Inexpressible(Exception):
    """Why a chat template is no Go template."""


@dataclass(frozen=True)
class Modelfile:
    text: str
    missing: str  # why there is no TEMPLATE, or ""
    notes: tuple[str, ...]  # where Ollama's prompts differ all the same


def write_modelfile(fused: Path, gguf: Path, stops: list[int], thinking: Thinking, sample: list[Message]) -> Modelfile:
    """Write `Modelfile` beside `gguf` for the fused model. `stops`: ids that end a turn; `sample`: a prompt to try."""
    result = modelfile(fused, gguf.name, stops, thinking, sample)
    with atomic_write(gguf.with_name("Modelfile")) as temporary:
        temporary.write_text(result.text, encoding="utf-8", newline="\n")
    return result


def modelfile(fused: Path, gguf: str, stops: list[int], thinking: Thinking, sample: list[Message]) -> Modelfile:
    """The file's text for `gguf`, a file name; see write_modelfile."""
    encoder = Encoder(load_tokenizer(fused), MaskingOptions(thinking=thinking))
    tokenizer = encoder.tokenizer
    config, generation = ModelFolder(fused).written_config, _read(fused / "generation_config.json")
    ends = generation.get("eos_token_id")
    every = [*stops, *([ends] if isinstance(ends, int) else ends or [])]
    texts = list(dict.fromkeys(tokenizer.decode([stop], skip_special_tokens=False) for stop in every))
    texts = [text for text in texts if text.strip()]
    lines = ["# Made by Twintune. To use it: ollama create NAME -f Modelfile", f"FROM ./{gguf}"]
    notes: list[str] = []
    missing = ""
    try:
        template, notes = go_template(encoder, texts, sample)
        lines += [f"# {note}" for note in notes]
        lines.append(f'TEMPLATE """{template}"""')
    except Inexpressible as why:
        missing = str(why)
        lines += [
            f"# No TEMPLATE: {' '.join(missing.split())}.",
            "# Ollama then goes by the chat template in the GGUF, as far as it knows it.",
        ]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in texts]
    longest = (config.get("text_config") or config).get("max_position_embeddings") or _CONTEXT
    lines.append(f"PARAMETER num_ctx {min(longest, _CONTEXT)}")
    lines.append(f"PARAMETER temperature {generation.get('temperature') or _TEMPERATURE:g}")
    return Modelfile("\n".join(lines) + "\n", missing, tuple(notes))


def go_template(encoder: Encoder, stops: list[str], sample: list[Message]) -> tuple[str, list[str]]:
    """The Go template that writes the prompts of the encoder's chat template, and where the two differ all the same.

    `stops`: the texts that end a turn; there turns are parted. Raises Inexpressible where the pieces between what is
    said are not the same in every conversation, or where `sample` or a conversation of the proof comes out otherwise.
    """
    if encoder.template is None:
        raise Inexpressible("the model has no chat template, and takes text as it is")
    think = encoder.masking.thinking == "keep"
    bos = encoder.tokenizer.bos_token if encoder.bos is not None else ""
    prompt = _prompt(encoder.template, think, bos)
    pieces: dict[str, str] = {}
    for roles in ("u", "uau", "uauau", "su", "suau", "suauau"):
        for name, literal in zip(_names(roles), _literals(prompt, roles), strict=True):
            if pieces.setdefault(name, literal) != literal:
                raise Inexpressible("the chat template renders a turn otherwise in a longer conversation")
    template = _compose(pieces, stops, encoder.template.special)
    said = [{"role": role, "content": text} for role, text in _SAID]
    plain = [{"role": m["role"], "content": m["content"].strip()} for m in split_thinking(sample)]
    for proof in (plain, *(said[start:count] for start in (0, 1) for count in range(2, len(said) + 1, 2))):
        if fault := difference(template, prompt, proof):
            raise Inexpressible(fault)
    return template, _notes(template, prompt, think)


def _prompt(renderer: ChatTemplate, think: bool, bos: str) -> Prompt:
    """The prompt that the exported model is served, as training rendered it: with a system text that the template does
    not take in the first user turn, and without the BOS that llama.cpp writes by itself."""

    def prompt(messages: list[Message]) -> str:
        refusal: Exception | None = None
        for form in (messages, fold_system(messages)):
            try:
                text = renderer.prompt(form, (), think) if form else ""
            except Exception as error:  # a template may raise anything
                refusal = refusal or error
                continue
            if form and all(m["content"].strip() in text for m in form if m["role"] != "assistant"):
                return text.removeprefix(bos)
        raise Inexpressible(f"the chat template refuses or leaves out what is said ({refusal or 'a text is missing'})")

    return prompt


def difference(template: str, prompt: Prompt, messages: list[Message]) -> str:
    """How the template's prompt for `messages` differs from the chat template's, or ""."""
    if not _ALTERNATING.fullmatch(" ".join(m["role"] for m in messages)):
        return ""  # tools are no part of our templates, and Ollama joins turns of one role
    expected, got = prompt(messages), execute(template, messages)
    same = len(common_prefix(expected, got))
    if expected == got:
        return ""
    return f"it would write {got[same : same + 20]!r} where the chat template writes {expected[same : same + 20]!r}"


def _notes(template: str, prompt: Prompt, think: bool) -> list[str]:
    """What the chat template does with a text, and a Go template in Ollama has no means to do."""
    padded = [{"role": role, "content": _PADDED[role]} for role in ("system", "user", "assistant", "user")]
    thought = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), _THOUGHT, strict=True)
    ]
    notes = []
    if any(difference(template, prompt, part) for part in (padded, padded[1:])):
        notes.append("Spaces around a text stay in Ollama's prompts; the chat template takes them off.")
    if think and difference(template, prompt, thought):
        notes.append("Thoughts of earlier answers stay in Ollama's prompts; the chat template leaves them out.")
    return notes


def _names(roles: str) -> list[str]:
    """What each piece stands between: `^s`, `su`, `ua`, `au`, and `u$`, the generation prompt."""
    edges = f"^{roles}$"
    return [edges[at : at + 2] for at in range(len(edges) - 1)]


def _literals(prompt: Prompt, roles: str) -> list[str]:
    full = {"s": "system", "u": "user", "a": "assistant"}
    marks = [PLACEHOLDER.format("", number, role) for number, role in enumerate(roles)]
    text = prompt([{"role": full[role], "content": mark} for role, mark in zip(roles, marks, strict=True)])
    found = [mark for mark in re.findall(PLACEHOLDER.format("", r"\d+", r"[sua]"), text)]
    if found != marks:
        raise Inexpressible(
            "the chat template leaves out, repeats or reorders what is said"
            + (" (the system text)" if found != marks and roles.startswith("s") else "")
        )
    return re.split("|".join(map(re.escape, marks)), text)


def _compose(pieces: dict[str, str], stops: list[str], special: re.Pattern[str]) -> str:
    first, again, after_system = pieces["^u"], pieces["au"], pieces["su"]
    head = _after_end(_common_suffix(first, again, special), stops)
    own_turn = after_system.endswith(head)  # else the system text stands within the first user turn
    end = _common_prefix(pieces["ua"], pieces["u$"], special)
    end = end[: len(end) - len(_after_end(end, stops))] or end
    answer, served = pieces["ua"][len(end) :], pieces["u$"][len(end) :]

    def when(condition: str, text: str, otherwise: str = "") -> str:
        if text == otherwise:
            return _literal(text)
        if not text:
            return when(f"not {condition}", otherwise)
        tail = f"{{{{ else }}}}{_literal(otherwise)}" if otherwise else ""
        return f"{{{{ if {condition} }}}}{_literal(text)}{tail}{{{{ end }}}}"

    system_end = after_system.removesuffix(head) if own_turn else after_system
    user_head = _literal(head) if own_turn else when("ne $i 1", head)
    return (
        "{{- range $i, $_ := .Messages }}\n"
        "{{- $last := eq (len (slice $.Messages $i)) 1 -}}\n"
        f'{{{{ if eq .Role "system" }}}}{_literal(pieces["^s"])}{{{{ .Content }}}}{_literal(system_end)}'
        f'{{{{ else if eq .Role "user" }}}}{when("eq $i 0", first.removesuffix(head))}{user_head}{{{{ .Content }}}}'
        f"{_literal(end)}{when('$last', served)}"
        f'{{{{ else if eq .Role "assistant" }}}}{when("$last", served, answer)}{{{{ .Content }}}}'
        f"{when('not $last', again.removesuffix(head))}{{{{ end }}}}\n"
        "{{- end }}"
    )


def _after_end(text: str, stops: list[str]) -> str:
    """What stands behind the last end of a turn in `text`: the head of the next."""
    ends = [found.end() for stop in stops for found in re.finditer(re.escape(stop) + r"\s*", text)]
    return text[max(ends, default=0) :]


def _common_prefix(one: str, other: str, special: re.Pattern[str]) -> str:
    """What both begin with, no token of `special` cut in two."""
    same = len(common_prefix(one, other))
    cut = [
        found.start() for text in (one, other) for found in special.finditer(text) if found.start() < same < found.end()
    ]
    return one[: min(cut, default=same)]


def _common_suffix(one: str, other: str, special: re.Pattern[str]) -> str:
    same = len(common_prefix(one[::-1], other[::-1]))
    for text in (one, other):
        edge = len(text) - same
        same = min(
            [same, *(len(text) - found.end() for found in special.finditer(text) if found.start() < edge < found.end())]
        )
    return one[len(one) - same :]


def _literal(text: str) -> str:
    """Text within a Go template within a Modelfile, whose parser drops what cannot be printed."""
    runs = (run for part in re.split(r'(\{\{|""")', text) for run in _runs(part))
    return "".join(f"{{{{ {_go_string(run)} }}}}" if quote else run for quote, run in runs)


def _runs(part: str) -> Iterator[tuple[bool, str]]:
    """Stretches of a text, and whether each must be quoted."""
    if part in ("{{", '"""'):
        yield True, part
        return
    for quote, letters in groupby(part, lambda letter: letter != "\n" and not letter.isprintable()):
        yield quote, "".join(letters)


def _go_string(text: str) -> str:
    def written(letter: str) -> str:
        return letter if letter.isascii() and letter.isprintable() and letter not in '"\\' else f"\\U{ord(letter):08x}"

    return f'"{"".join(map(written, text))}"'


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

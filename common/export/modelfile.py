"""The Modelfile that Ollama makes a model from: its prompt template found in the chat template that training used.

The chat template is rendered with placeholders for the contents, in conversations of several lengths, with a system
text and without. The texts between the placeholders become a Go template (`go_template.py`). It is kept only where its
prompts for other conversations equal the chat template's exactly.
Source: Ollama's docs/modelfile.md, parser/parser.go and template/template.go.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.data.chat_template import PLACEHOLDER, ChatTemplate, Message, Refused
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.message_forms import fold_system, split_thinking
from common.data.turn_edges import common_prefix
from common.export.go_template import TurnTexts
from common.export.model_sampling import Thinking, settings_in
from common.files import atomic_write
from common.models.model_folder import ModelFolder

RenderPrompt = Callable[[list[Message]], str]
_CONTEXT = 8192  # that Ollama takes memory for: more where training had more, less where the model has less
# Where the model names no other. Ollama's own repeat_penalty, 1.1 until August 2026, is none that was trained for.
_SAMPLING = {"temperature": 0.7, "repetition_penalty": 1.0}
SPLIT_NOTE = "Ollama reads no split GGUF. First make one file of it:"
_NAMES = {"repetition_penalty": "repeat_penalty"}  # by which Ollama knows a setting of generation_config.json
_CASES = (
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
_REASONING = ("Why?", "<think>\nWell.\n</think>\n\nIt is so.", "Why?")


class Inexpressible(Exception):
    """Why a chat template cannot be a Go template."""


@dataclass(frozen=True)
class Modelfile:
    text: str
    missing: str  # why there is no TEMPLATE, or ""
    notes: tuple[str, ...]  # where Ollama's prompts differ all the same


def write_modelfile(
    fused: Path,
    gguf: Path,
    stops: list[int],
    thinking: Thinking,
    sample: list[Message],
    parts: Sequence[str] = (),
    trained: int = 0,
) -> Modelfile:
    """Write `Modelfile` beside `gguf` for the fused model. `stops`: ids that end a turn; `sample`: a prompt to try.

    parts: the files' names, where `gguf` is split: Ollama reads only one file, which its user makes of them.
    trained: how many tokens a row of training may have.
    """
    result = modelfile(fused, gguf.name, stops, thinking, sample, trained)
    if parts:
        head, rest = result.text.split("\n", 1)
        made = f"# {SPLIT_NOTE} {merge_command(parts[0], gguf.name)}"
        result = replace(result, text=f"{head}\n{made}\n{rest}", notes=(made.removeprefix("# "), *result.notes))
    with atomic_write(gguf.with_name("Modelfile")) as temporary:
        temporary.write_text(result.text, encoding="utf-8", newline="\n")
    return result


def merge_command(first: str, whole: str) -> str:
    """What makes one file of a split GGUF. first: its first file."""
    return f"llama-gguf-split --merge {first} {whole}"


def modelfile(
    fused: Path, gguf: str, stops: list[int], thinking: Thinking, sample: list[Message], trained: int = 0
) -> Modelfile:
    """The file's text for `gguf`, a file name; see write_modelfile."""
    encoder = Encoder(load_tokenizer(fused), MaskingOptions(thinking=thinking))
    tokenizer = encoder.tokenizer
    model = ModelFolder(fused)
    config, every = model.written_config, [*stops, *model.end_ids]
    texts = list(dict.fromkeys(tokenizer.decode([stop], skip_special_tokens=False) for stop in every))
    texts = [text for text in texts if text.strip()]
    lines = ["# Made by Twintune. To use it: ollama create NAME -f Modelfile", f"FROM ./{gguf}"]
    notes: list[str] = []
    missing = ""
    try:
        turns, notes = turn_texts(encoder, texts, sample)
        lines += [f"# {note}" for note in notes]
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    except Inexpressible as why:
        missing = str(why)
        lines += [
            f"# No TEMPLATE: {' '.join(missing.split())}.",
            "# Ollama then goes by the chat template in the GGUF, as far as it knows it.",
        ]
    unheld = [text for text in texts if not _holds(text)]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in texts if text not in unheld]
    lost = [f"The stop text {text!a} is missing: a Modelfile cannot hold it." for text in unheld]
    lines += [f"# {note}" for note in lost]
    longest = (config.get("text_config") or config).get("max_position_embeddings") or _CONTEXT
    lines.append(f"PARAMETER num_ctx {min(longest, max(_CONTEXT, trained))}")
    sampling = _SAMPLING | settings_in(model.generation_config)
    lines += [f"PARAMETER {_NAMES.get(name, name)} {value:g}" for name, value in sampling.items()]
    return Modelfile("\n".join(lines) + "\n", missing, (*notes, *lost))


def turn_texts(encoder: Encoder, stops: list[str], sample: list[Message]) -> tuple[TurnTexts, list[str]]:
    """The texts around the turns that make the prompts of the encoder's chat template, and where the two still differ.

    `stops`: the texts that end a turn; turns are separated there. Raises Inexpressible where the texts between the
    contents are not the same in every conversation, or where the prompt for `sample` or for one of the check's
    conversations differs.
    """
    if encoder.template is None:
        raise Inexpressible("the model has no chat template, and takes text as it is")
    think = encoder.masking.thinking == "keep"
    bos = encoder.tokenizer.bos_token if encoder.bos is not None else ""
    prompt = _prompt(encoder.template, think, bos)
    between: dict[str, str] = {}
    for roles in ("u", "uau", "uauau", "su", "suau", "suauau"):
        for name, text in zip(_names(roles), _texts_between(prompt, roles), strict=True):
            if between.setdefault(name, text) != text:
                raise Inexpressible("the chat template renders a turn otherwise in a longer conversation")
    texts = TurnTexts.of(between, stops, encoder.template.special)
    cases = [{"role": role, "content": content} for role, content in _CASES]
    parted = split_thinking(sample, encoder.template.has_think_tags)
    plain = [{"role": m["role"], "content": m["content"].strip()} for m in parted]
    if difference(texts, prompt, plain):  # not quoted: it is a row's, and the file may be published
        raise Inexpressible("it would write another prompt than the chat template for a row of the data")
    for case in (cases[start:count] for start in (0, 1) for count in range(2, len(cases) + 1, 2)):
        if fault := difference(texts, prompt, case):
            raise Inexpressible(fault)
    return texts, _notes(texts, prompt, think)


def _prompt(chat_template: ChatTemplate, think: bool, bos: str) -> RenderPrompt:
    """The prompt that the exported model is served, as training rendered it.

    A system text that the template does not take stands in the first user turn. The BOS that llama.cpp writes by itself
    is left out.
    """

    def prompt(messages: list[Message]) -> str:
        refusal: Exception | None = None
        forms = (messages, fold_system(messages))
        for form in reversed(forms) if chat_template.folds_system else forms:
            try:
                text = chat_template.prompt(form, (), think) if form else ""
            except Refused as error:
                refusal = refusal or error
                continue
            if form and all(m["content"].strip() in text for m in form if m["role"] != "assistant"):
                return text.removeprefix(bos)
        raise Inexpressible(f"the chat template refuses or leaves out a content ({refusal or 'a text is missing'})")

    return prompt


def difference(texts: TurnTexts, prompt: RenderPrompt, messages: list[Message]) -> str:
    """How the prompt of `texts` for `messages` differs from the chat template's, or ""."""
    if not _ALTERNATING.fullmatch(" ".join(m["role"] for m in messages)):
        return ""  # our templates have no tools, and Ollama joins consecutive turns of one role
    expected, got = prompt(messages), texts.prompt(messages)
    if expected == got:
        return ""
    same = len(common_prefix(expected, got))
    return f"it would write {got[same : same + 20]!r} where the chat template writes {expected[same : same + 20]!r}"


def _notes(texts: TurnTexts, prompt: RenderPrompt, think: bool) -> list[str]:
    """What the chat template does with a content, and a Go template in Ollama cannot do."""
    padded = [{"role": role, "content": _PADDED[role]} for role in ("system", "user", "assistant", "user")]
    reasoning = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), _REASONING, strict=True)
    ]
    notes = []
    if any(difference(texts, prompt, part) for part in (padded, padded[1:])):
        notes.append("Spaces around a text stay in Ollama's prompts; the chat template removes them.")
    if think and difference(texts, prompt, reasoning):
        notes.append("The reasoning of earlier answers stays in Ollama's prompts; the chat template leaves it out.")
    return notes


def _names(roles: str) -> list[str]:
    """What each text stands between: `^s`, `su`, `ua`, `au`, and `u$`, the generation prompt."""
    edges = f"^{roles}$"
    return [edges[at : at + 2] for at in range(len(edges) - 1)]


def _texts_between(prompt: RenderPrompt, roles: str) -> list[str]:
    """The texts before, between and after the contents, in a conversation of such roles (`suau`: by first letters)."""
    full = {"s": "system", "u": "user", "a": "assistant"}
    placeholders = [PLACEHOLDER.format("", number, role) for number, role in enumerate(roles)]
    messages = [
        {"role": full[role], "content": placeholder} for role, placeholder in zip(roles, placeholders, strict=True)
    ]
    text = prompt(messages)
    if re.findall(PLACEHOLDER.format("", r"\d+", r"[sua]"), text) != placeholders:
        raise Inexpressible(
            "the chat template leaves out, repeats or reorders contents"
            + (" (the system text)" if roles.startswith("s") else "")
        )
    return re.split("|".join(map(re.escape, placeholders)), text)


def _holds(text: str) -> bool:
    """Whether Ollama reads the text back: three quotes would end it early, and what is not printable is dropped."""
    return '"""' not in text and all(letter.isprintable() or letter in "\t\r\n" for letter in text)


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'

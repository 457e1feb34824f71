"""The goals of a training: what each changes of train's defaults and why, and the YAML file that says so.

`init` writes such a file for a user's model and rows; the presets in `configs/` are the same files for usual ones.
Learning rate, epochs, batch size and rank stand in none of them: --recipe auto chooses these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

Language = Literal["en", "ja"]


@dataclass(frozen=True)
class Setting:
    """An option, its value, and the reason."""

    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Goal:
    about: str  # what the model does afterwards
    rows: int  # for so many it is meant, at least
    tokens: int  # of a usual row
    settings: tuple[Setting, ...]
    prompts: dict[Language, tuple[str, ...]]  # answered at each validation; empty where those of rows are enough


_ROLLBACK = Setting(
    "on_collapse",
    "rollback",
    "few rows are soon known by heart: where answers collapse, continue from the best adapter at half the rate",
)
_SHORT = Setting("max_length", 512, "tokens of a row, as such turns are short; longer rows are left out and counted")
_QUESTIONS: dict[Language, tuple[str, ...]] = {
    "en": ("Who are you?", "What did you do today?"),
    "ja": ("あなたは誰ですか？", "今日は何をしましたか？"),
}
GOALS: dict[str, Goal] = {
    "persona": Goal("speaks as one person does", 100, 160, (_SHORT, _ROLLBACK), _QUESTIONS),
    "assistant": Goal(
        "answers the questions of one field",
        1_000,
        400,
        (Setting("max_length", 2048, "tokens of a row: long answers and several turns stay complete"),),
        {"en": ("What can you help me with?",), "ja": ("何を手伝ってくれますか？",)},
    ),
    "japanese": Goal(
        "writes Japanese in your style",
        400,
        200,
        (_ROLLBACK, Setting("imatrix", True, "quantize with the weights in mind that your rows use most")),
        {"en": _QUESTIONS["ja"], "ja": _QUESTIONS["ja"]},
    ),
    "tools": Goal(
        "calls tools",
        1_000,
        900,
        (
            Setting("max_length", 4096, "tokens of a row: the definitions of the tools stand in each"),
            Setting("tools", "system", "where the chat template takes no tools, they are written into the system text"),
        ),
        {"en": (), "ja": ()},
    ),
    "reasoning": Goal(
        "reasons before it answers",
        1_000,
        1_200,
        (
            Setting("thinking", "keep", "train the reasoning in your rows, and export a model that reasons"),
            Setting("max_length", 4096, "tokens of a row: reasoning is long"),
        ),
        {"en": (), "ja": ()},
    ),
    "classify": Goal(
        "names one of a few classes",
        500,
        120,
        (
            Setting("train_on", "last", "only the last turn is a class; turns before it are examples"),
            _SHORT,
            Setting("valid_share", 0.2, "more rows for validation: a class is one short answer, and many are counted"),
        ),
        {"en": (), "ja": ()},
    ),
    "text": Goal(
        "continues texts such as yours",
        200,
        800,
        (Setting("overflow", "split", "long texts are cut into blocks of --max-length tokens, and nothing is lost"),),
        {"en": (), "ja": ()},
    ),
}
FOUR_BITS = Setting(
    "quantization",
    "4bit",
    "hold the frozen base in 4 bits, a fourth of 16; the GGUF is made from the 16-bit base all the same",
)


def settings_of(goal: str, language: Language, four_bits: bool) -> list[Setting]:
    """What a training for this goal changes of train's defaults."""
    found = [FOUR_BITS] if four_bits else []
    found += GOALS[goal].settings
    if prompts := GOALS[goal].prompts[language]:
        found.append(Setting("sample_prompt", list(prompts), "answered at each validation: you see the change"))
    return found


def as_yaml(head: Sequence[str], model: Setting, data: Setting | None, settings: Sequence[Setting]) -> str:
    """The text of a file for --config: lines of comment, then each setting below its reason."""
    top = "".join(comment(line) for line in head) + ("\n" if model.why else "")
    return "\n".join([top + written(model), *map(written, [data] if data else []), *map(written, settings)])


def written(setting: Setting) -> str:
    """The setting as a line of YAML below its reason."""
    line = yaml.safe_dump({setting.name: setting.value}, allow_unicode=True, width=1_000)
    return comment(setting.why) + line if setting.why else line


def comment(text: str) -> str:
    """A line of comment, whatever is in the name of a stranger's file."""
    line = " ".join(text.splitlines())
    return f"# {''.join(one if one.isprintable() else one.encode('unicode_escape').decode() for one in line)}\n"

"""The page's words in English and Japanese, and the Japanese of sentences that a run recorded in English."""

import re
from functools import cache
from importlib import resources
from typing import Literal

from common.documents import parse_yaml

Lang = Literal["en", "ja"]
LANGS: tuple[Lang, ...] = ("en", "ja")
_LONGEST = 2_000  # characters of a sentence of the program; a longer text is somebody else's
_VALUE = re.compile(r"\{(\w+)\}")
_LISTS = {"commas": (", (?![^(]*[)])", "、"), "semicolons": ("; ", "; ")}  # how they are split and joined


@cache
def texts(lang: Lang) -> dict[str, str]:
    return parse_yaml(template(f"{lang}.yaml"))


def template(name: str) -> str:
    """The text of a file of templates/."""
    return (resources.files("common.report") / "templates" / name).read_text(encoding="utf-8")


def sentence(text: str, lang: Lang) -> str:
    """A sentence that the program recorded, in the language; any other text as it is."""
    if lang == "en" or len(text) > _LONGEST:
        return text
    for pattern, japanese in _patterns(lang):
        if found := pattern.fullmatch(text):
            return japanese.format(**{name: _value(name, value, lang) for name, value in found.groupdict().items()})
    return text


def _value(name: str, value: str, lang: Lang) -> str:
    if name in _LISTS:
        split, join = _LISTS[name]
        return join.join(sentence(part, lang) for part in re.split(split, value))
    return sentence(value, lang) if name.startswith("text") else value


@cache
def sentences(lang: Lang) -> dict[str, str]:
    """Those of the program with their values as `{name}`, and the same in the language."""
    return parse_yaml(template(f"{lang}.sentences.yaml"))


@cache
def _patterns(lang: Lang) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(_pattern(english), re.DOTALL), other) for english, other in sentences(lang).items()]


def _pattern(english: str) -> str:
    """What the sentence matches. Few values may have a space, so that a long text is compared in little time."""
    parts = _VALUE.split(english)  # each second one is a name
    for at in range(len(parts)):
        spaced = parts[at].startswith(("text", "free")) or parts[at] in _LISTS
        parts[at] = f"(?P<{parts[at]}>{'.+' if spaced else '[^ ]+'})" if at % 2 else re.escape(parts[at])
    return "".join(parts)

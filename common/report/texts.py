"""The page's words in English and Japanese. What a run recorded as a sentence stays as it was written."""

from functools import cache
from importlib import resources
from typing import Literal

from common.documents import parse_yaml

Lang = Literal["en", "ja"]
LANGS: tuple[Lang, ...] = ("en", "ja")


@cache
def texts(lang: Lang) -> dict[str, str]:
    return parse_yaml(template(f"{lang}.yaml"))


def template(name: str) -> str:
    """The text of a file of templates/."""
    return (resources.files("common.report") / "templates" / name).read_text(encoding="utf-8")

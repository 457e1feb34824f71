"""The base model's license: which it is, what it asks of whoever distributes the model, and its files."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.documents import YAML_BYTES, parse_yaml
from common.files import atomic_write
from common.model_files import copy_file, license_files
from common.models.gguf_import import MIRRORS

_LLAMA = (
    "It is a derivative of {name} and stands under the {name} Community License ({link}): its recipients get a copy of "
    "the license, and its use must keep to the Acceptable Use Policy ({policy}).{more}\n\n"
)
_BUILT = " Whoever passes it on shows “Built with {mark}” prominently, and its name begins with “{begins}”."


@dataclass(frozen=True)
class Terms:
    """What the base's license asks of a derived model.

    license, name, link: as in the hub's card metadata (`license: other` needs a name). words: the card's section on
    them. notice: the text that a Notice file beside the weights must have. begins: how a derived model's name must
    begin.
    """

    license: str
    name: str = ""
    link: str = ""
    words: str = ""
    notice: str = ""
    begins: str = ""


_PARTS = {part.name for part in fields(Terms)}


def _llama(version: str) -> Terms:
    name = f"Llama {version}" if version != "3" else "Meta Llama 3"
    link = f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
    mark, begins = ("Meta Llama 3", "Llama 3") if version == "3" else ("Llama", "Llama")
    more = "" if version == "2" else _BUILT.format(mark=mark, begins=begins)
    policy = link.replace("license/", "use-policy")
    capitals = "LLAMA 2" if version == "2" else name
    notice = (
        f"{name} is licensed under the {capitals} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    words = _LLAMA.format(name=name, link=link, policy=policy, more=more) + notice
    words = words if version == "2" else f"**Built with {mark}.** {words}"
    return Terms(f"llama{version}", words=words, link=link, notice=notice, begins="" if version == "2" else begins)


_GEMMA = Terms(
    "gemma",
    link="https://ai.google.dev/gemma/terms",
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    words="It is a Model Derivative of Gemma: Gemma is provided under and subject to the Gemma Terms of Use found at "
    "[ai.google.dev/gemma/terms](https://ai.google.dev/gemma/terms). Whoever passes it on gives a copy of those "
    "terms along, binds recipients to their section 3.2 and to the "
    "[Prohibited Use Policy](https://ai.google.dev/gemma/prohibited_use_policy), says that the files were modified "
    "(the weights were, by fine-tuning), and keeps the Notice file.",
)
KNOWN = {f"llama{version}": _llama(version) for version in ("2", "3", "3.1", "3.2", "3.3")} | {"gemma": _GEMMA}
_TITLES = {
    "apache-2.0": r"apache license\s+version 2\.0",
    "mit": r"\bmit license\b",
    "gemma": r"gemma terms of use",
    **{f"llama{v}": rf"llama {re.escape(v)} community license" for v in ("2", "3", "3.1", "3.2", "3.3")},
}
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_LONGEST = 300  # characters of a license's id, name or link
_GEMMA_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text")


def find_terms(folder: Path, model: str, model_type: str) -> Terms:
    """The base's terms: by its card, else its license file, else what is known of the model; else `other`, unnamed."""
    card = read_front_matter(folder / "README.md")
    named = _line(card, "license")
    if named in KNOWN:
        return KNOWN[named]
    if named:
        name, link = (_line(card, key) for key in ("license_name", "license_link"))
        if link and "://" not in link:  # a file of the base's repository
            link = f"https://huggingface.co/{model}/blob/main/{link}" if is_hub_name(model) else ""
        return Terms(named, name or ("see-base-model" if named == "other" else ""), link)
    for name in (name for name in license_files(folder) if name.startswith(("LICENSE", "LICENCE"))):
        with (folder / name).open(encoding="utf-8", errors="replace") as file:
            head = file.read(3000).lower()
        if found := next((name for name, title in _TITLES.items() if re.search(title, head)), None):
            return KNOWN.get(found, Terms(found))
    if model in MIRRORS:
        return KNOWN.get(MIRRORS[model].license, Terms(MIRRORS[model].license))
    if model_type in _GEMMA_TYPES:
        return _GEMMA
    return Terms("other", "see-base-model", f"https://huggingface.co/{model}" if is_hub_name(model) else "")


def terms_of(kept: dict[str, str]) -> Terms:
    """The terms on a run's record, which another version may have written."""
    return Terms(**{"license": "other"} | {name: text for name, text in kept.items() if name in _PARTS})


def copy_terms(base: Path, out: Path, terms: Terms) -> list[str]:
    """Copy the base's license and safety files to `out`, with the Notice that the terms ask for; their names.

    A Notice of the base's own stays as it is.
    """
    names = license_files(base)
    for name in names:
        with atomic_write(out / name) as temporary:
            copy_file(base / name, temporary)
    if terms.notice and not any(name.lower().startswith("notice") for name in names):
        with atomic_write(out / "NOTICE") as temporary:
            temporary.write_text(terms.notice + "\n", encoding="utf-8")
        names.append("NOTICE")
    return names


def is_hub_name(model: str) -> bool:
    """Whether a model or data set has a name of the hub's form, and is not a path on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model)) and not Path(model).exists()


def read_front_matter(path: Path) -> dict[Any, Any]:
    """The YAML metadata at the head of a model card; empty where there is none or it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(YAML_BYTES).decode("utf-8-sig", errors="ignore")  # cut anywhere
        found = _FRONT_MATTER.match(head)
        return parse_yaml(found[1]) if found else {}
    except (OSError, ValueError):
        return {}


def _line(card: dict[Any, Any], key: str) -> str:
    """The card's value where it is a line of text that could be true, else empty."""
    value = card.get(key)
    return value if isinstance(value, str) and len(value) <= _LONGEST and value.isprintable() else ""

"""attest.json: what is stated of a run, with a hash over its own content."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common import strict_json
from common.attest import computed, kept
from common.attest.subject import Figures, Subject, digest
from common.documents import fault_of, read_json
from common.errors import UserError

FORMAT = 1
_REMEDY = "Give the attest.json that `twintune attest RUN` wrote."


@dataclass(frozen=True)
class Section:
    """A part of the attest. how: read, hashed or computed. needs: what must be there, or the part is left out.

    recorded: whether a run that has it can always state it, so that an attest without it leaves it out.
    rounding: parts of the names of figures that another machine may rightly compute otherwise.
    """

    figures: Callable[[Subject], Figures]
    how: str
    needs: str
    rounding: tuple[str, ...] = ()
    recorded: bool = False


_ANSWER = ("answer", "ended by", "text")
# In the order in which they are made: cheap ones first.
SECTIONS = {
    "recipe": Section(kept.recipe, "read", "recipe.yaml"),
    "curve": Section(kept.curve, "read", "metrics.jsonl"),
    "held-out rows": Section(kept.held_out, "read", "run.json"),
    "memory": Section(kept.memory, "read", "run.json"),
    "versions": Section(kept.versions, "read", "environment.json"),
    "files": Section(kept.files, "hashed", "adapter, fused folder or GGUF"),
    "stops": Section(kept.stops, "read", "the fused folder"),
    "label map": Section(kept.labels, "computed", "the run's data and its base model"),
    "verification cases": Section(kept.cases, "computed", "verify-cases.json and the fused folder"),
    "fused again": Section(computed.fused_again, "computed", "the base model and the adapter, fused into 16 bits"),
    "bf16 GGUF": Section(computed.bf16, "computed", "the fused folder and llama.cpp", ("sha256",)),
    "verification": Section(computed.verification, "computed", "GGUFs that were verified, llama.cpp", ("found",), True),
    "answers of the tuned model": Section(computed.tuned_answers, "computed", "a GGUF and llama.cpp", _ANSWER),
    "answers of the base model": Section(computed.base_answers, "computed", "the base model, a backend", _ANSWER),
    "parity of the backends": Section(computed.parity, "computed", "a record of the family, both backends"),
}


class SectionRecord(BaseModel):
    """figures: by name; nested. missing: what it needs, where that was not there."""

    model_config = ConfigDict(extra="forbid")

    figures: dict[str, Any] = {}
    missing: str = ""


class Attest(BaseModel):
    """The file. with_text: whether it holds rows and answers as text."""

    model_config = ConfigDict(extra="forbid")

    format: int
    sha256: str
    made: dict[str, Any]
    with_text: bool
    sections: dict[str, SectionRecord]


def collect(
    given: Subject, names: Iterable[str] = tuple(SECTIONS)
) -> tuple[dict[str, SectionRecord], dict[str, UserError]]:
    """`(every section of these names, why by the name of those that cannot be made here)`."""
    sections, faults = {}, {}
    for name in names:
        section = SECTIONS[name]
        try:
            sections[name] = SectionRecord(figures=_plain(section.figures(given)))
        except UserError as error:  # its text may name paths, and stays here
            sections[name], faults[name] = SectionRecord(missing=section.needs), error
    return sections, faults


def content_of(given: Subject, sections: dict[str, SectionRecord], page: str) -> dict[str, Any]:
    """The file's content, its hash included. page: the digest of what makes the page of it."""
    content = {
        "format": FORMAT,
        "made": {"date": date.today().isoformat(), "page": page} | given.made(),
        "with_text": given.texts,
        "sections": {name: section.model_dump(exclude_defaults=True) for name, section in sections.items()},
    }
    content = _plain(content)
    return content | {"sha256": own_hash(content)}


def own_hash(content: dict[str, Any]) -> str:
    """SHA-256 over the JSON of all but `sha256`, its keys sorted."""
    return digest({name: value for name, value in content.items() if name != "sha256"})


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """As it is read again: null for what is not finite, lists for tuples."""
    found: dict[str, Any] = json.loads(strict_json.dumps(content))
    return found


def read_attest(path: Path) -> tuple[dict[str, Any], Attest]:
    """`(the content as it is, the same checked)`. Raises UserError where it is no attest of this version."""
    try:
        content = read_json(path, _REMEDY)
        found = Attest.model_validate(content, strict=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.", _REMEDY) from None
    except ValidationError as error:
        raise UserError(f"{path} is no attest{fault_of(error)}.", _REMEDY) from None
    if found.format != FORMAT:
        raise UserError(
            f"{path} has format {found.format}, and this version of Twintune reads format {FORMAT}.",
            "Use the version that wrote it; `made` in the file names it.",
        )
    return content, found

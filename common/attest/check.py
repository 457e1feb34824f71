"""An attest compared with what is computed again, figure by figure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.attest.document import SECTIONS, Attest, SectionRecord
from common.attest.subject import digest
from common.errors import UserError
from common.report.kept import number
from common.verify.parity import BOUNDS

State = Literal["reproduced", "differs", "not checkable here"]
STATES: tuple[State, ...] = ("reproduced", "differs", "not checkable here")

# How far a figure may be from the stated one, absolute and as a share of it; all others must be equal.
# KL divergences depend on how a processor rounds; a fault of a quantization shows in the first digit.
TOLERANCES = {
    ("verification", "mean KL"): (5e-5, 0.05),
    ("verification", "p99 KL"): (5e-4, 0.1),
    ("verification", "top-1 agreement"): (0.02, 0.0),
    ("verification", "perplexity"): (0.0, 0.02),
} | {("parity of the backends", name): (bound, 0.0) for name, bound in BOUNDS.items()}


@dataclass(frozen=True)
class Outcome:
    """Of one figure. why: where it cannot be checked."""

    section: str
    name: str
    state: State
    stated: Any = None
    found: Any = None
    why: str = ""


def compare(
    stated: Attest,
    found: dict[str, SectionRecord],
    faults: dict[str, UserError],
    other: str,
    absent: Sequence[str] = (),
) -> Iterator[Outcome]:
    """The outcome of every figure that is stated, and of what should be: an attest that leaves out a figure differs.

    other: in what this machine rounds otherwise, where it does. absent: files that the attest names and are not here.
    """
    for name in [name for name in SECTIONS if name not in stated.sections]:
        yield Outcome(name, "", "differs", found="a section that the attest leaves out")
    for name, section in stated.sections.items():
        if name not in SECTIONS:
            yield Outcome(name, "", "differs", "a section", "Twintune states no such section")
        elif section.missing not in ("", SECTIONS[name].needs):
            yield Outcome(name, "", "differs", section.missing, SECTIONS[name].needs)
        elif not section.figures and name in found and name not in faults:
            yield Outcome(name, "", "differs", found="a section that the attest leaves empty")
        elif not section.figures:
            why = f"the attest states nothing: its author lacked {SECTIONS[name].needs}"
            yield Outcome(name, "", "not checkable here", why=why)
        else:
            said, here = dict(flat(section.figures)), dict(flat(found[name].figures))
            for figure, value in said.items():
                if _is_forged(name, figure, said):
                    yield Outcome(name, figure, "differs", value, "a text with another hash than the stated one")
                elif name in faults:
                    yield Outcome(name, figure, "not checkable here", value, why=faults[name].what)
                else:
                    yield _outcome(name, figure, value, here, other, absent)
            for figure in [figure for figure in here if figure not in said]:
                yield Outcome(name, figure, "differs", None, here[figure])


def to_collect(stated: Attest) -> tuple[list[str], list[str]]:
    """`(sections whose figures are checked, empty ones whose author could have stated them)`.

    Whoever has a run can state what is read or hashed, and what was computed when it was verified. For the rest the
    author may have lacked a model or a program.
    """
    known = {name: section for name, section in stated.sections.items() if name in SECTIONS}
    empty = [name for name, section in known.items() if not section.figures]
    always = [name for name in empty if SECTIONS[name].recorded or SECTIONS[name].how != "computed"]
    return [name for name in known if name not in empty], always


def _is_forged(section: str, figure: str, said: dict[str, Any]) -> bool:
    """Whether it is the text of an answer, and the answer's hash is that of another."""
    head, _, last = figure.rpartition(" / ")
    return section.startswith("answers") and last == "text" and digest(said[figure]) != said.get(f"{head} / answer")


def _outcome(
    section: str, figure: str, stated: Any, here: dict[str, Any], other: str, absent: Sequence[str]
) -> Outcome:
    if figure not in here:
        if not here or (section == "files" and figure in absent):
            return Outcome(section, figure, "not checkable here", stated, why="nothing here gives this figure")
        if absent and section == "verification":  # it is of GGUFs that may have been deleted
            why = f"files that the attest names are not here, such as {absent[0]}"
            return Outcome(section, figure, "not checkable here", stated, why=why)
        return Outcome(section, figure, "differs", stated)
    found = here[figure]
    if within(section, figure, stated, found):
        return Outcome(section, figure, "reproduced", stated, found)
    if other and set(SECTIONS[section].rounding) & set(figure.split(" / ")):
        why = f"it depends on rounding, and this machine differs in {other}"
        return Outcome(section, figure, "not checkable here", stated, found, why)
    return Outcome(section, figure, "differs", stated, found)


def within(section: str, figure: str, stated: Any, found: Any) -> bool:
    """Whether the two agree, within the tolerance where the figure has one."""
    bound = TOLERANCES.get((section, figure.rpartition(" / ")[2]))
    one, other = number(stated), number(found)
    if bound and one is not None and other is not None:
        return abs(one - other) <= bound[0] + bound[1] * abs(one)
    return type(stated) is type(found) and bool(stated == found)


def flat(figures: dict[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """`(name, value)` of every figure, the names of nested ones joined by a stroke."""
    for name, value in figures.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{head}{name} / ")
        else:
            yield f"{head}{name}", value

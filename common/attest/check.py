"""An attest compared with what is computed again, figure by figure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.attest.document import SECTIONS, Attest, SectionRecord
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
            yield Outcome(name, "", "not checkable here", why="this version of Twintune has no such section")
        elif not section.figures and name not in faults and _always_stated(name):
            yield Outcome(name, "", "differs", found="a section that the attest leaves empty")
        elif not section.figures:
            yield Outcome(name, "", "not checkable here", why=f"the attest states nothing: it lacked {section.missing}")
        elif name in faults:
            for figure, value in flat(section.figures):
                yield Outcome(name, figure, "not checkable here", value, why=faults[name].what)
        else:
            here = dict(flat(found[name].figures))
            said = dict(flat(section.figures))
            for figure, value in said.items():
                yield _outcome(name, figure, value, here, other, absent)
            for figure in [figure for figure in here if figure not in said]:
                yield Outcome(name, figure, "differs", None, here[figure])


def _always_stated(name: str) -> bool:
    """Whether whoever has the run can state it, without a model or a program that the author may have lacked."""
    return SECTIONS[name].recorded or SECTIONS[name].how != "computed"


def _outcome(
    section: str, figure: str, stated: Any, here: dict[str, Any], other: str, absent: Sequence[str]
) -> Outcome:
    if figure not in here:
        if figure in absent or not here:
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

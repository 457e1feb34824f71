"""attest.html: the figures of attest.json as a page, of nothing else, so that it can be made again and compared."""

from importlib.metadata import version
from typing import Any

from common.attest.check import TOLERANCES, flat
from common.attest.document import SECTIONS, Attest
from common.attest.subject import digest
from common.errors import UserError
from common.report.charts import Chart, Curve
from common.report.kept import Point, number
from common.report.page import page, render
from common.report.run_charts import curve_chart
from common.report.sections import Card, Table, verdict_badge
from common.report.texts import template, texts

_SOURCES = ("attest.html", "page.html", "parts.html", "page.css", "page.js", "en.yaml")
_HOW = {
    "read": "as the run has it on record",
    "hashed": "the SHA-256 of each file",
    "computed": "computed again by a check",
}


def page_digest() -> str:
    """Of all that makes a page of the file's figures: where it is another, the page may rightly look otherwise."""
    return digest([*map(template, _SOURCES), version("vl-convert-python")])


def attest_page(stated: Attest) -> str:
    """The complete HTML. Every text is escaped: a stranger may have written the file.

    Raises UserError where a loss is beyond what a chart can show.
    """
    try:
        charts = {chart.key: chart for chart in _charts(stated)}
    except OverflowError:
        raise UserError("The attest states a loss that is too large to compute with.", "Give another file.") from None
    sections = [(name, _about(name), _table(stated, name)) for name in stated.sections]
    verdict = str(_figure(stated, "verification", "verdict") or "none")
    body = render(
        "attest.html",
        attest=stated,
        badge=verdict_badge(verdict),
        verdict=verdict,
        cards=_cards(stated),
        made=[[str(name), _shown(value)] for name, value in flat(stated.made)],
        sections=sections,
        tolerances=_tolerances(),
        charts=charts,
        t=texts("en"),
    )
    return page(f"{stated.made.get('model')} - Attest", body, charts, "en")


def _figure(stated: Attest, section: str, name: str) -> Any:
    kept = stated.sections.get(section)
    return dict(flat(kept.figures)).get(name) if kept else None


def _cards(stated: Attest) -> list[Card]:
    found = []
    before, after = (
        number(_figure(stated, "held-out rows", f"validation loss {when}")) for when in ("before", "after")
    )
    if after is not None:
        found.append(Card("validation loss", f"{after:.4g}", f"before training {before:.4g}" if before else ""))
    for name, value in flat(stated.sections["verification"].figures if "verification" in stated.sections else {}):
        head, _, last = name.rpartition(" / ")
        if last == "mean KL" and (kl := number(value)) is not None and not head.endswith((" / base", " / fused")):
            top = number(_figure(stated, "verification", f"{head} / top-1 agreement"))
            note = f"top-1 agreement {top:.1%}" if top is not None else ""
            found.append(Card(f"mean KL of {head.rpartition(' / ')[2]}", f"{kl:.2g}", note))
    return found


def _charts(stated: Attest) -> list[Chart]:
    curves = [Curve(name, _points(_figure(stated, "curve", name))) for name in ("training", "validation")]
    chart = curve_chart("loss", [curve for curve in curves if curve.points], texts("en"))
    return [chart] if chart else []


def _points(given: Any) -> list[Point]:
    """Pairs of step and loss, as far as it holds them."""
    found = []
    for pair in given if isinstance(given, list) else []:
        numbers = [number(value) for value in pair] if isinstance(pair, list) and len(pair) == 2 else [None]
        if None not in numbers:
            found.append((float(pair[0]), float(pair[1])))
    return found


def _about(name: str) -> str:
    return _HOW[SECTIONS[name].how] if name in SECTIONS else ""


def _table(stated: Attest, name: str) -> Table:
    rows = [[figure, _shown(value)] for figure, value in flat(stated.sections[name].figures)]
    return Table(["figure", "value"], [row for row in rows if not (name == "curve" and row[0] in _DRAWN)])


_DRAWN = ("training", "validation")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _tolerances() -> Table:
    rows = [[section, name, f"{a:g}", f"{b:.0%}"] for (section, name), (a, b) in TOLERANCES.items()]
    return Table(["section", "figure", "absolute", "of the stated figure"], rows, 2)

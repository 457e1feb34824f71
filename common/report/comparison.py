"""The page of several runs: their curves over each other, and the table of `compare`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

from common.report.charts import Axes, Chart, Curve
from common.report.kept import Kept, Point, read_kept
from common.report.page import page, render, write_page
from common.report.run_charts import Texts, bars, curve_chart, speeds
from common.report.texts import Lang, sentence, texts
from common.run_record import Run


@dataclass(frozen=True)
class Comparison:
    """What `compare` says: its table, and sentences on what can be compared."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def write_comparison(runs: Sequence[Path], said: Comparison, path: Path, lang: Lang) -> None:
    t, kept = texts(lang), [read_kept(Run(run), texts=False) for run in runs]
    names = _names(kept)
    charts = {chart.key: chart for chart in _charts(dict(zip(names, kept, strict=True)), t) if chart is not None}
    in_lang = partial(sentence, lang=lang)
    rows = [list(map(in_lang, row)) for row in said.rows]
    said = Comparison(said.columns, rows, [in_lang(note) for note in said.notes])
    body = render("comparison.html", t=t, names=names, runs=kept, said=said, charts=charts)
    write_page(path, page(f"{', '.join(names)} - {t['comparison']}", body, charts, lang))


def _names(kept: list[Kept]) -> list[str]:
    """The runs' names, without the words that all begin with; numbered where two are the same."""
    names = [one.name for one in kept]
    words = zip(*(re.split(r"(?<=[-_])", name)[:-1] for name in names), strict=False)
    shared = takewhile(lambda same: len(set(same)) == 1, words)
    prefix = "".join(word for word, *_ in shared)
    short = [name[len(prefix) :] for name in names]
    return [f"{number}: {name}" if short.count(name) > 1 else name for number, name in enumerate(short, 1)]


def _charts(kept: dict[str, Kept], t: Texts) -> list[Chart | None]:
    def curves(figure: str) -> list[Curve]:
        return over_each_other({name: one.points(figure) for name, one in kept.items()})

    def over_each_other(points: dict[str, list[Point]]) -> list[Curve]:
        return [Curve(name, found, dashed=number > 0) for number, (name, found) in enumerate(points.items())]

    speed_curves = over_each_other({name: speeds(one) for name, one in kept.items()})
    speed = {name: one.record.tokens_per_second for name, one in kept.items()}
    peak = {name: one.record.peak_memory_bytes for name, one in kept.items()}
    return [
        curve_chart("loss", curves("loss"), t, title=f"{t['chart.loss']}: {t['curve.train']}"),
        curve_chart("valid", curves("valid_loss"), t, title=f"{t['chart.loss']}: {t['curve.valid']}"),
        curve_chart("speed", speed_curves, t, note=t["note.speed"]),
        curve_chart("memory", curves("memory"), t),
        curve_chart("norm", curves("grad_norm"), t),
        curve_chart("rate", curves("learning_rate"), t),
        bars("speeds", {n: v for n, v in speed.items() if v}, Axes("", t["axis.speed"], form=",.0f"), t),
        bars("peaks", {n: float(v) for n, v in peak.items() if v}, Axes("", t["axis.memory"], " GB", 1e9, ".2f"), t),
    ]

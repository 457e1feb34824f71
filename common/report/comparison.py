"""The page of several runs: their curves over each other, and the table of `compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.report.charts import Axes, Chart, Curve
from common.report.kept import Kept, Point, read_kept
from common.report.page import page, render, write_page
from common.report.run_charts import Texts, bars, curve_chart, speeds
from common.report.texts import Lang, sentence, texts
from common.run_record import Run


@dataclass(frozen=True)
class Comparison:
    """What `compare` says: its table, whose columns name the runs, and sentences on what can be compared."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def write_comparison(runs: Sequence[Path], said: Comparison, path: Path, lang: Lang) -> None:
    t, kept = texts(lang), [read_kept(Run(run), texts=False) for run in runs]
    names = said.columns[1:]
    charts = {chart.key: chart for chart in _charts(dict(zip(names, kept, strict=True)), t) if chart is not None}
    in_lang = partial(sentence, lang=lang)
    rows = [list(map(in_lang, row)) for row in said.rows]
    said = Comparison(said.columns, rows, [in_lang(note) for note in said.notes])
    body = render("comparison.html", t=t, names=names, runs=kept, said=said, charts=charts)
    write_page(path, page(f"{', '.join(names)} - {t['comparison']}", body, charts, lang))


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """For each run the shortest end of its path that no other's path has; numbered where one is given twice."""
    paths = [run.resolve() for run in runs]
    names = []
    for number, path in enumerate(paths, 1):
        others = [other for other in paths if other != path]
        ends = (Path(*path.parts[-count:]) for count in range(1, len(path.parts) + 1))
        name = next(
            str(end) for end in ends if not any(other.parts[-len(end.parts) :] == end.parts for other in others)
        )
        names.append(f"{name} ({number})" if paths.count(path) > 1 else name)
    return names


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

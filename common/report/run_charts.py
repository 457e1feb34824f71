"""The charts of one run."""

from collections.abc import Mapping, Sequence

from common.display import gigabytes
from common.report.charts import Axes, Chart, Curve, Level, Words, bar_chart, histogram, line_chart
from common.report.kept import Kept, Point, number, points_of
from common.run_fields import DataFacts, ExportRecord

Texts = dict[str, str]
_GB = 1e9
_ABOVE = 2.0  # times what the chart shows: a level above that would flatten it


def run_charts(kept: Kept, t: Texts) -> dict[str, Chart]:
    """By their keys; without those for which the run kept no figures."""
    charts = [
        _loss(kept, t),
        curve_chart("rate", [Curve(t["curve.rate"], kept.points("learning_rate"))], t),
        curve_chart("norm", [Curve(t["curve.norm"], kept.points("grad_norm"))], t),
        curve_chart("speed", [Curve(t["curve.speed"], speeds(kept))], t, note=t["note.speed"]),
        _memory(kept, t),
        curve_chart("swap", [Curve(t["curve.swap"], kept.points("swap"))], t),
        _lengths(kept.facts.data, t),
        _scripts(kept.facts.data, t),
        _sizes(kept.record.export, t),
        _divergence(kept, t),
    ]
    return {chart.key: chart for chart in charts if chart is not None}


def curve_chart(
    key: str, curves: list[Curve], t: Texts, levels: Sequence[Level] = (), note: str = "", title: str = ""
) -> Chart | None:
    """Curves of the kind `key`: loss, valid, rate, norm, speed, memory or swap."""
    forms = {
        "loss": Axes(t["axis.step"], t["axis.loss"], form=".4g", log=True),
        "valid": Axes(t["axis.step"], t["axis.loss"], form=".4g", log=True),
        "rate": Axes(t["axis.step"], t["axis.rate"], form=".2e", zero=True),
        "norm": Axes(t["axis.step"], t["axis.norm"], form=".3g", log=True),
        "speed": Axes(t["axis.step"], t["axis.speed"], form=",.0f", zero=True),
        "memory": Axes(t["axis.step"], t["axis.memory"], " GB", _GB, ".2f", zero=True),
        "swap": Axes(t["axis.step"], t["axis.memory"], " GB", _GB, ".2f", zero=True, height=150),
    }
    words = Words(t["alt.curve"], t["alt.level"], t["alt.log"])
    return line_chart(key, title or t[f"chart.{key}"], curves, forms[key], words, levels, note)


def speeds(kept: Kept) -> list[Point]:
    """Tokens a second of every step but the first, which warms up."""
    timed = [line for line in kept.metrics if number(line.get("seconds")) and number(line.get("tokens")) is not None]
    return points_of(timed[1:], lambda line: line["tokens"] / line["seconds"])


def base_loss(kept: Kept) -> float | None:
    """The validation loss before the first step."""
    return next((loss for step, loss in kept.points("valid_loss") if step == 0), number(kept.record.start_valid_loss))


def _loss(kept: Kept, t: Texts) -> Chart | None:
    base = base_loss(kept)
    curves = [Curve(t["curve.train"], kept.points("loss")), Curve(t["curve.valid"], kept.points("valid_loss"))]
    return curve_chart("loss", curves, t, [Level(t["level.base"], base, f"{base:.4g}")] if base else [])


def _memory(kept: Kept, t: Texts) -> Chart | None:
    points, budget = kept.points("memory"), kept.plan.memory_budget if kept.plan else 0
    levels, note = [], ""
    estimate = kept.record.predicted_peak_bytes or 0
    if estimate:
        levels.append(Level(t["level.estimate"], estimate, gigabytes(estimate)))
    if budget and budget <= _ABOVE * max([estimate, *(value for _, value in points)]):
        levels.append(Level(t["level.budget"], budget, gigabytes(budget)))
    elif budget:
        note = t["note.budget"].format(budget=gigabytes(budget))
    return curve_chart("memory", [Curve(t["curve.memory"], points)], t, levels, note)


def _lengths(data: DataFacts, t: Texts) -> Chart | None:
    if not data.counts or len(data.edges) != len(data.counts) + 1:
        return None
    most = max(range(len(data.counts)), key=data.counts.__getitem__)
    alt = t["alt.lengths"].format(
        count=f"{data.counts[most]:,}",
        low=data.edges[most],
        high=data.edges[most + 1] - 1,
        shortest=data.edges[0],
        longest=data.edges[-1],
    )
    axes = Axes(t["axis.tokens"], t["axis.rows"])
    return histogram("lengths", t["chart.lengths"], data.edges, data.counts, axes, alt)


def _scripts(data: DataFacts, t: Texts) -> Chart | None:
    counts = {t.get(f"script.{name}", name): count for name, count in data.scripts.items()}
    return bars("scripts", counts, Axes(t["axis.script"], t["axis.answers"], form=",.0f"), t)


def _sizes(export: ExportRecord, t: Texts) -> Chart | None:
    sizes = {gguf.name: float(gguf.bytes) for gguf in sorted(export.gguf, key=lambda gguf: -gguf.bytes)}
    return bars("sizes", sizes, Axes(t["axis.type"], t["axis.size"], " MB", 1e6, ",.1f"), t)


def _divergence(kept: Kept, t: Texts) -> Chart | None:
    """The ladder of quantization: how far each type is from the BF16 GGUF."""
    found = kept.record.verify.divergence if kept.record.verify else {}
    names = [gguf.name for gguf in sorted(kept.record.export.gguf, key=lambda gguf: -gguf.bytes)]
    known = {name: found[name].mean_kl for name in names if name in found}
    finite = {name: kl for name, kl in known.items() if number(kl) is not None and kl is not None}
    return bars("kl", finite, Axes(t["axis.type"], t["axis.kl"], form=".2g"), t)


def bars(key: str, figures: Mapping[str, float], axes: Axes, t: Texts) -> Chart | None:
    title = t[f"chart.{key}"]
    shown = ", ".join(f"{name} {axes.shown(value)}" for name, value in figures.items())
    return bar_chart(key, title, figures, axes, t["alt.bars"].format(title=title, bars=shown))

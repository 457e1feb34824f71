"""Charts as Vega-Lite specifications, each with a title, a text that says what it shows, and its figures as a table.

Colors are names of the page's style, so that they follow its light or dark scheme.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from common.report.kept import Point

MOST_POINTS = 400  # of a curve; longer ones are thinned, so that the page stays small
_SEVERAL = 60  # points up to which each is drawn as a dot too
_WIDE = 50.0  # ratio of the largest to the least figure from which on the axis is logarithmic
_TABLE_ROWS = 12
_COLORS = [f"var(--series-{number})" for number in range(1, 7)]
_AXIS = {
    "domain": False,
    "ticks": False,
    "labelPadding": 6,
    "labelFontSize": 11,
    "titleFontSize": 11,
    "titleFontWeight": "normal",
}
# As in page.css: Vega measures by it how much room labels take.
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans CJK JP", sans-serif'


@dataclass(frozen=True)
class Curve:
    """A named line of a chart."""

    name: str
    points: Sequence[Point]
    dashed: bool = False  # so that an equal curve below it is seen


@dataclass(frozen=True)
class Level:
    """A figure that holds for all steps, drawn as a dashed line. shown: as text."""

    name: str
    value: float
    shown: str


@dataclass(frozen=True)
class Chart:
    """key: its id on the page. alt: what it shows, in words. rows: its figures, under `columns`."""

    key: str
    title: str
    alt: str
    spec: dict[str, Any]
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Axes:
    """What the axes are called. unit: behind figures; scale: what figures are divided by."""

    x: str
    y: str
    unit: str = ""
    scale: float = 1.0
    form: str = ".4g"
    log: bool = False  # where figures differ widely
    zero: bool = False
    height: int = 260

    def shown(self, value: float) -> str:
        return f"{value / self.scale:{self.form}}{self.unit}"


@dataclass(frozen=True)
class Words:
    """Of the texts that say what a chart shows."""

    curve: str
    level: str
    log: str


def line_chart(
    key: str,
    title: str,
    curves: Sequence[Curve],
    axes: Axes,
    words: Words,
    levels: Sequence[Level] = (),
    note: str = "",
) -> Chart | None:
    """Curves over steps, those without points left out; None where none is left."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    values = [value for curve in curves for _, value in curve.points]
    decades = _decades(values) if axes.log and _is_wide(values) else []
    drawn = [(curve, _thinned(curve.points)) for curve in curves]
    names = [curve.name for curve in curves] + [level.name for level in levels]
    spec = _spec(title) | {
        "height": axes.height,
        "layer": [
            *(_line(curve, points, axes, decades) for curve, points in drawn),
            *(_rule(level, axes) for level in levels),
        ],
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "axis": _AXIS | {"grid": False, "format": "~s", "tickMinStep": 1, "title": axes.x},
            },
            "color": {
                "field": "s",
                "type": "nominal",
                "scale": {"domain": names, "range": (_COLORS * len(names))[: len(names)]},
                "legend": {
                    "orient": "top",
                    "title": None,
                    "labelFontSize": 12,
                    "symbolType": "stroke",
                    "labelLimit": 320,
                }
                if len(names) > 1
                else None,
            },
        },
    }
    texts = [words.curve.format(name=curve.name, **_extremes(curve.points, axes)) for curve in curves]
    texts += [words.level.format(name=level.name, value=level.shown) for level in levels]
    spec["description"] = alt = f"{title}{f' ({words.log})' if decades else ''}. {' '.join(texts)}"
    return Chart(key, title, alt, spec, [axes.x, *(curve.name for curve in curves)], _table(curves, axes), note)


def bar_chart(key: str, title: str, bars: Mapping[str, float], axes: Axes, alt: str) -> Chart | None:
    """A bar for each name, from top to bottom."""
    if not bars:
        return None
    values = [{"x": name, "y": value / axes.scale, "t": axes.shown(value)} for name, value in bars.items()]
    place = {"field": "x", "type": "nominal", "sort": None, "axis": _AXIS | {"title": None, "labelLimit": 220}}
    length = {"field": "y", "type": "quantitative", "axis": _AXIS | {"title": axes.y, "tickCount": 5}}
    spec = _spec(title) | {
        "height": 30 * len(bars) + 46,
        "data": {"values": values},
        "description": alt,
        "encoding": {"y": place, "x": length},
        "layer": [
            {"mark": {"type": "bar", "color": _COLORS[0], "cornerRadiusEnd": 3, "height": 18, "aria": False}},
            {
                "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "aria": False},
                "encoding": {"text": {"field": "t"}},
            },
        ],
    }
    rows = [[name, axes.shown(value)] for name, value in bars.items()]
    return Chart(key, title, alt, spec, [axes.x, axes.y], rows)


def histogram(key: str, title: str, edges: Sequence[int], counts: Sequence[int], axes: Axes, alt: str) -> Chart | None:
    """counts: between two edges each; None where they do not fit together."""
    if not counts or len(edges) != len(counts) + 1:
        return None
    ranges = list(pairwise(edges))
    values = [{"x": low, "x2": high, "y": count} for (low, high), count in zip(ranges, counts, strict=True)]
    spec = _spec(title) | {
        "height": 200,
        "data": {"values": values},
        "description": alt,
        "mark": {"type": "bar", "color": _COLORS[0], "binSpacing": 1, "tooltip": True, "aria": False},
        "encoding": {
            "x": {
                **{"field": "x", "type": "quantitative", "bin": {"binned": True}},
                **{"axis": _AXIS | {"grid": False, "title": axes.x, "labelOverlap": True}, "scale": {"zero": False}},
            },
            "x2": {"field": "x2"},
            "y": {"field": "y", "type": "quantitative", "axis": _AXIS | {"title": axes.y, "tickCount": 5}},
        },
    }
    rows = [[f"{low:,}-{high - 1:,}", f"{count:,}"] for (low, high), count in zip(ranges, counts, strict=True)]
    return Chart(key, title, alt, spec, [axes.x, axes.y], rows)


def _spec(title: str) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "usermeta": {"title": title},
        "width": "container",
        "background": None,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": {"left": 2, "top": 4, "right": 10, "bottom": 2},
        "config": {"view": {"stroke": None}, "font": _FONT},
    }


def _line(curve: Curve, points: Sequence[Point], axes: Axes, decades: list[float]) -> dict[str, Any]:
    scale: dict[str, Any] = {"type": "log"} if decades else {"zero": axes.zero, "nice": True}
    if axes.zero and not any(y for _, y in points):
        scale["domain"] = [0, 1]  # else there is no axis
    format_ = {"format": "~g", "values": decades} if decades else {"tickCount": 5}
    mark: dict[str, Any] = {"type": "line", "strokeWidth": 1.8, "strokeJoin": "round", "aria": False}
    if curve.dashed:
        mark["strokeDash"] = [5, 5]
    if len(points) <= _SEVERAL:
        mark["point"] = {"size": 22, "filled": True, "tooltip": True, "aria": False}
    return {
        "data": {"values": [{"x": x, "y": y / axes.scale, "s": curve.name} for x, y in points if y > 0 or not decades]},
        "mark": mark,
        "encoding": {
            "y": {
                "field": "y",
                "type": "quantitative",
                "scale": scale,
                "axis": _AXIS | {"title": axes.y} | format_,
            }
        },
    }


def _rule(level: Level, axes: Axes) -> dict[str, Any]:
    return {
        "data": {"values": [{"y": level.value / axes.scale, "s": level.name}]},
        "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.5, "aria": False},
        "encoding": {"x": None, "y": {"field": "y", "type": "quantitative"}},
    }


def _decades(values: list[float]) -> list[float]:
    """The powers of ten around the figures, for a logarithmic axis."""
    above = [value for value in values if value > 0]
    low, high = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
    return [10.0**power for power in range(max(low, -300), high + 1)]


def _is_wide(values: list[float]) -> bool:
    above = [value for value in values if value > 0]
    return bool(above) and max(above) > _WIDE * min(above)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Evenly MOST_POINTS of them, the first and the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    gap = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(at * gap)] for at in range(MOST_POINTS)]


def _extremes(points: Sequence[Point], axes: Axes) -> dict[str, str]:
    low, high = (pick(points, key=lambda point: point[1]) for pick in (min, max))
    places = {"first": points[0], "lowest": low, "highest": high, "last": points[-1]}
    shown = {name: axes.shown(value) for name, (_, value) in places.items()}
    return shown | {f"{name}_step": f"{step:,}" for name, (step, _) in places.items()}


def _table(curves: Sequence[Curve], axes: Axes) -> list[list[str]]:
    """At most _TABLE_ROWS steps, evenly drawn from those of the shortest curve; of other curves what these have."""
    steps = [step for step, _ in min((curve.points for curve in curves), key=len)]
    count = min(len(steps), _TABLE_ROWS)
    chosen = [steps[round(at * (len(steps) - 1) / max(1, count - 1))] for at in range(count)]
    known = [dict(curve.points) for curve in curves]
    return [[f"{step:,}", *(axes.shown(one[step]) if step in one else "-" for one in known)] for step in chosen]

"""What a run folder keeps, read for its page: whatever is missing, damaged or of another version is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.documents import read_json, read_json_lines
from common.errors import UserError
from common.option_fields import TrackFields
from common.options import Options
from common.recipe import Plan, Recipe
from common.run_fields import ReportFacts, RunRecord
from common.run_record import Run

_MOST = 1e300
_T = TypeVar("_T")
Line = dict[str, Any]
Point = tuple[float, float]  # step and figure


@dataclass(frozen=True)
class Kept:
    """Of one run. texts: whether rows, answers and samples may be shown."""

    run: Run
    record: RunRecord
    recipe: Recipe | None
    plan: Plan | None
    metrics: list[Line]
    samples: list[Line]
    environment: dict[str, Any]
    facts: ReportFacts
    texts: bool

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def model(self) -> str:
        return self.record.model

    def points(self, name: str) -> list[Point]:
        """The figure `name` of the lines that have it."""
        return points_of(self.metrics, lambda line: line.get(name))


def read_kept(run: Run, texts: bool = True) -> Kept:
    """Raises UserError where the folder holds no run, or its record cannot be read."""
    record = run.record
    return Kept(
        run=run,
        record=record,
        recipe=_or_none(lambda: run.recipe),
        plan=_or_none(lambda: run.plan),
        metrics=_lines(run.metrics),
        samples=_lines(run.samples),
        environment=_or_none(lambda: read_json(run.path / "environment.json", "")) or {},
        facts=_or_none(run.read_report_facts) or ReportFacts(),
        texts=texts and not record.options.get("no_text"),
    )


_SHOWN = {"lang", "no_text", *TrackFields.model_fields}


def keep_shown(run: Run, options: Options) -> None:
    """Put on record how the run is shown and tracked from now on; without text, rows kept for its page are removed."""
    record = run.record
    named = {"llama_cpp": record.named_llama_cpp} if record.named_llama_cpp else {}
    run.update(options=record.options | named | options.model_dump(include=_SHOWN))
    if options.no_text:
        facts = run.read_report_facts()
        data = facts.data.model_copy(update={"rows": []})
        run.write_report_facts(facts.model_copy(update={"data": data}))


def points_of(lines: list[Line], figure: Callable[[Line], Any]) -> list[Point]:
    return [(line["step"], value) for line in lines if (value := number(figure(line))) is not None]


def number(value: Any) -> float | None:
    """`value` where it is a number that can be computed with."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
    return value if known else None


def _lines(path: Path) -> list[Line]:
    """Those that name a step."""
    found = _or_none(lambda: read_json_lines(path, "")) or []
    return [line for line in found if number(line.get("step")) is not None]


def _or_none(read: Callable[[], _T]) -> _T | None:
    try:
        return read()
    except (UserError, FileNotFoundError):
        return None

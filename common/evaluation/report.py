"""An evaluation as tables, and as files: every row with its answers, and the figures."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from common import strict_json
from common.display import Display
from common.documents import read_json
from common.errors import UserError
from common.evaluation.bootstrap import Estimate, perplexity
from common.evaluation.judge import Evaluation, Judged, Scores
from common.files import atomic_write

_SHOWN = 10


def show(given: Evaluation, judged: Sequence[Judged], scores: Sequence[Scores], display: Display) -> None:
    """The table of figures, that of differences to the base, and what they leave out."""
    _say_what_is_missing(judged, given, display)
    columns = {
        f"{one.name}{'' if len(one.rows) == len(given.rows) else f', {len(one.rows)} rows'}": one for one in scores
    }
    cells = {name: _cells(one, given.seed) for name, one in columns.items()}
    table = []
    for subject in (one.subject.name for one in judged):
        table.append([subject, *(text for name in columns for text in cells[name].get(subject, _blank(columns[name])))])
    heads = [head for name, one in columns.items() for head in ([name, "perplexity"] if one.name == "loss" else [name])]
    title = f"{len(given.rows)} rows, each figure with its 95 % interval over resampled rows"
    display.table(title, ["", *heads], table)
    changes = {name: one.differences(given.seed) for name, one in columns.items()}
    if others := [
        subject for subject in (one.subject.name for one in judged) if any(subject in c for c in changes.values())
    ]:
        lines = [
            [subject, *(_change(changes[name].get(subject), columns[name]) for name in columns)] for subject in others
        ]
        display.table("Against the base, on the same rows", ["", *columns], lines)


def _say_what_is_missing(judged: Sequence[Judged], given: Evaluation, display: Display) -> None:
    for one in judged:
        cut = sum(answer["finish"] == "length" for answer in one.answers.values())
        if cut:
            what = f"{cut} of {len(one.answers)} answers were cut at --max-tokens {given.max_tokens} or --context"
            display.say(f"{one.subject.name}: {what}")
        if one.refused:
            lines = [f"{given.rows[n].source}: {why}" for n, why in one.refused.items()]
            more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
            head = f"{one.subject.name} refused {len(lines)} prompts, whose rows are left out for all:"
            display.warn("\n".join([head, *lines[:_SHOWN], *more]))


def _blank(scores: Scores) -> list[str]:
    return ["-"] * (2 if scores.name == "loss" else 1)


def _cells(scores: Scores, seed: int) -> dict[str, list[str]]:
    """By subject, what the columns of the metric show."""
    found = {}
    for name, estimate in scores.estimates(seed).items():
        if scores.name == "loss":
            found[name] = [_two_lines(f"{estimate:.4f}"), _two_lines(f"{estimate.through(perplexity):.3f}")]
        elif scores.is_share:
            passed = round(estimate.value * estimate.rows)
            found[name] = [_two_lines(f"{passed} of {estimate.rows}, {estimate:.0%}")]
        else:
            found[name] = [_two_lines(f"{estimate:.2f}")]
    return found


def _two_lines(text: str) -> str:
    """The figure above its interval: so the table is narrow."""
    return text.replace(" [", "\n[")


def _change(estimate: Estimate | None, scores: Scores) -> str:
    if estimate is None:
        return "-"
    return _two_lines(format(estimate, "+.0%" if scores.is_share else "+.4f" if scores.name == "loss" else "+.2f"))


def folder_of(folder: Path, about: dict[str, str]) -> Path:
    """The folder, or the first of NAME-2, NAME-3 ..., whose figures are not of other data or of another model."""
    names = chain([folder.name], (f"{folder.name}-{number}" for number in count(2)))
    for found in map(folder.with_name, names):
        known: dict[str, Any] = {}
        with suppress(UserError, OSError):  # none, or damaged
            known = read_json(found / "scores.json", "")
        if all(known.get(name, given) == given for name, given in about.items()):
            return found
    raise AssertionError  # numbers do not end


def write(given: Evaluation, judged: Sequence[Judged], scores: Sequence[Scores], about: dict[str, Any]) -> None:
    """`rows.jsonl` and `scores.json` in the folder of the evaluation, each completely or not at all."""
    with atomic_write(given.folder / "rows.jsonl") as temporary:
        lines = (strict_json.dumps(_row(n, given, judged, scores)) for n in range(len(given.rows)))
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    content = about | {
        "rows": len(given.rows),
        "seed": given.seed,
        "max_tokens": given.max_tokens,
        "models": {one.subject.name: {} for one in judged},
        "against_base": {},
    }
    for one in scores:
        for name, estimate in one.estimates(given.seed).items():
            content["models"][name][one.name] = estimate.record()
            if one.name == "loss":
                content["models"][name]["perplexity"] = estimate.through(perplexity).record()
        for name, estimate in one.differences(given.seed).items():
            content["against_base"].setdefault(name, {})[one.name] = estimate.record()
    with atomic_write(given.folder / "scores.json") as temporary:
        temporary.write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _row(n: int, given: Evaluation, judged: Sequence[Judged], scores: Sequence[Scores]) -> dict[str, Any]:
    row = given.rows[n]
    models: dict[str, dict[str, Any]] = {}
    for one in judged:
        found: dict[str, Any] = dict(one.answers.get(n, {}))
        found.pop("row", None)
        if n in one.refused:
            found["refused"] = one.refused[n]
        for score in scores:
            if n in score.place and one.subject.name in score.statistics:
                statistics = score.statistics[one.subject.name][score.place[n]]
                found[score.name] = score.figure(statistics)
        models[one.subject.name] = found
    prompt = {} if row.prompt is None else {"messages": list(row.prompt.messages)}
    tools = {"tools": list(row.prompt.tools)} if row.prompt is not None and row.prompt.tools else {}
    return {"row": row.source, **prompt, **tools, "reference": row.reference, "models": models}

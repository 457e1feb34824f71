"""`compare RUN RUN`: runs side by side."""

import argparse
from pathlib import Path
from typing import Any

from common.context import Context
from common.display import Display, gigabytes
from common.errors import UserError
from common.recipe import Recipe
from common.report.comparison import Comparison, distinct_names, write_comparison
from common.report.texts import LANGS, Lang
from common.run_fields import RunRecord
from common.run_record import Run


def compare(runs: list[Path], display: Display, html: Path | None = None, lang: Lang = "en") -> None:
    """Print a table of the runs: recipe agreement first, then figures, each with its ratio to the first run's.

    html: a page with the same, and the runs' curves.
    """
    records, recipes = [Run(run).require_complete() for run in runs], [Run(run).recipe for run in runs]
    names = distinct_names(runs)
    said = Comparison(["", *names], _rows(runs, records, recipes), _notes(names, records, recipes))
    display.table("Compared with the first run", said.columns, said.rows)
    for note in said.notes:
        display.say(note)
    if html is not None:
        write_comparison(runs, said, html, lang)
        display.show(f"The comparison is in {html}", kind="report", path=str(html))


def _rows(runs: list[Path], records: list[RunRecord], recipes: list[Recipe]) -> list[list[str]]:
    rows = [["recipe", *[record.recipe_hash[:12] for record in records]]]
    rows.append(["agrees", "-", *["yes" if r.hash() == recipes[0].hash() else "NO" for r in recipes[1:]]])
    for name in ("backend", "device"):
        rows.append([name, *[str(getattr(record, name)) for record in records]])
    rows.append(["devices", *[str(Run(run).plan.ranks) for run in runs]])
    rows.append(["precision", *[recipe.precision for recipe in recipes]])
    tested = {record.test_hash for record in records}
    for label, key, show in (
        ("tokens/s", "tokens_per_second", "{:.1f}"),
        ("label tokens/s", "label_tokens_per_second", "{:.1f}"),
        ("train time, s", "train_seconds", "{:.1f}"),
        ("estimated peak memory", "predicted_peak_bytes", "GB"),
        ("peak memory", "peak_memory_bytes", "GB"),
        ("peak RSS", "peak_rss_bytes", "GB"),
        ("padding (in attention only)", "padding_fraction", "{:.2%}"),
        ("final train loss", "final_train_loss", "{:.4f}"),
        ("best valid loss", "best_valid_loss", "{:.4f}"),
        ("test loss", "test_loss", "{:.4f}"),
        ("test rows", "test_rows", "{}"),
        ("best step", "best_step", "{}"),
    ):
        compares = key != "test_loss" or (len(tested) == 1 and None not in tested)
        rows.append([label, *_with_ratios([getattr(record, key) for record in records], show, compares)])
    shares = [stage_shares(record) for record in records]
    for stage in dict.fromkeys(name for share in shares for name in share):
        rows.append([f"time: {stage}", *[f"{share[stage]:.1%}" if stage in share else "-" for share in shares]])
    return rows


def _notes(names: list[str], records: list[RunRecord], recipes: list[Recipe]) -> list[str]:
    """What can be compared, and what cannot."""
    notes = []
    for name, recipe in zip(names[1:], recipes[1:], strict=True):
        notes.append(_agreement(names[0], recipes[0], name, recipe))
    for name, recipe in zip(names, recipes, strict=True):
        if recipe.parent is not None and recipe.parent.step:
            notes.append(f"{name} continues {recipe.parent}: its curve until then is of that recipe.")
    for name, record in zip(names, records, strict=True):
        if len(record.plans) > 1:
            moves = ", ".join(map(_moved, record.plans))
            notes.append(f"{name} changed its plan during training ({moves}): its speed and memory are of both plans.")
    for name, record in zip(names, records, strict=True):
        if record.shares:
            notes.append(f"{name} was computed by {'; '.join(_shares(record.shares))}.")
    kinds = {record.memory_kind for record in records}
    if len(kinds) > 1:
        notes.append(
            f"peak memory was measured in different ways ({', '.join(sorted(map(str, kinds)))}): "
            "compare peak RSS instead, which is the same in every run."
        )
    return notes


def _shares(shares: list[dict[str, Any]]) -> list[str]:
    total = sum(share["tokens"] for share in shares)
    return [
        f"{share['who']} ({share['what']}): {share['tokens'] / total:.0%} of the tokens, "
        f"{share['tokens_per_second']:.0f} tokens/s"
        for share in shares
    ]


def _moved(plan: dict[str, Any]) -> str:
    card = f":{plan['device_index']}" if plan.get("device_index") else ""
    ranks = f" ({plan['ranks']} ranks)" if plan.get("ranks", 1) > 1 else ""
    return f"{plan['backend']} on {plan['device']}{card}{ranks} from step {plan['from_step']}"


def stage_shares(record: RunRecord) -> dict[str, float]:
    """Each stage's share of a run's time, in the order in which they came."""
    total = sum(record.stage_seconds.values())
    return {name: value / total for name, value in record.stage_seconds.items()} if total else {}


def _with_ratios(values: list[float | None], show: str, compares: bool = True) -> list[str]:
    cells = []
    for value in values:
        if value is None:
            cells.append("-")
            continue
        text = gigabytes(value) if show == "GB" else show.format(value)
        first = values[0]
        cells.append(f"{text}  ({value / first:.2f}x)" if cells and first and show != "{}" and compares else text)
    return cells


def _agreement(first_name: str, first: Recipe, name: str, recipe: Recipe) -> str:
    if recipe.hash() == first.hash():
        text = f"{name}: the same recipe as {first_name}: the same curve up to rounding, so speeds compare."
        if recipe.dropout:
            text += " Dropout masks differ between frameworks, so the curves agree only statistically."
        return text
    one, other = first.hashed(), recipe.hashed()
    both = [key for key in one if key in other and key != "parent"]
    differing = [f"{key} {one[key]} / {other[key]}" for key in both if one[key] != other[key]]
    if first.parent != recipe.parent:
        differing.append(f"parent {first.parent} / {recipe.parent}")
    if (one.keys() ^ other.keys()) - {"parent"}:
        differing.append("a recipe of version 1 does not state its rows' hash")
    return f"{name}: NOT the same recipe as {first_name}, the losses do not compare: {'; '.join(differing)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two or more run folders")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the runs' curves over each other")
    parser.add_argument("--lang", choices=LANGS, default="en", help="language of the page of --html (default: en)")


def run(args: argparse.Namespace, context: Context) -> None:
    if len(args.runs) < 2:
        raise UserError("compare needs two or more runs.", "python cli.py compare RUN RUN")
    compare(args.runs, context.display, args.html, args.lang)

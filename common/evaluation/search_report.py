"""What a search found: a table, a plot, the best recipe as YAML, and whether it is better by more than noise."""

import math
from pathlib import Path
from statistics import mean

import yaml

from common.display import Display, Styled
from common.evaluation.search import SEEDS
from common.evaluation.search_space import Settings, Space
from common.evaluation.study import Outcome, Study
from common.files import atomic_write
from common.option_fields import extra_of
from common.option_sources import absolute_paths
from common.options import Options, by_flag

# Of the machine and of a single run; the precision changes the result.
_LEFT_OUT = {"config", "recipe", "rehash"} | {
    name
    for name, field in by_flag().items()
    if extra_of(field)["heading"] in ("Memory and device", "Export", "Output") and name != "precision"
}
_COLUMNS = {"learning_rate": "rate", "batch_size": "batch", "dropout": "drop"}  # short: a table has 80 columns
_COLORS = {"complete": "tab:blue", "pruned": "tab:gray"}


def judged(study: Study) -> tuple[Outcome, str]:
    """`(the trial to take, why)`: the best, or the automatic recipe where that is not better by more than noise."""
    automatic, best, delta = study.outcomes()[0], study.best(), study.space.options.min_delta
    if best is None:
        raise ValueError("no trial is complete")
    against = f"{best.value:.4f} against {automatic.value:.4f}"
    if best.number == automatic.number:
        return automatic, "no trial was better than the automatic recipe"
    if automatic.how != "complete":
        return best, f"trial {best.number} is the best; the automatic recipe {automatic.how}"
    if not best.beats(automatic, delta):
        return automatic, (
            f"no trial beat the automatic recipe by more than noise: {against} of trial {best.number}, "
            f"less than {delta:.1%} lower (--min-delta)"
        )
    again = {key: each.value for key, each in study.repetitions().items() if each.how not in ("unfinished", "failed")}
    seeds = [more for more in SEEDS if {(best.number, more), (automatic.number, more)} <= again.keys()]
    if not seeds:
        return best, (
            f"trial {best.number} is better than the automatic recipe, {against}; neither was repeated with another "
            "seed, so this may be noise"
        )
    ones, others = ([again[each.number, more] for more in seeds] for each in (best, automatic))
    noise = max(_spread([best.value, *ones]), _spread([automatic.value, *others]))
    seeds_said = "1 other seed" if len(seeds) == 1 else f"{len(seeds)} other seeds"
    figures = (
        f"with {seeds_said} {mean(ones):.4f} against {mean(others):.4f} on average, and the losses of one recipe "
        f"differ by up to {noise:.4f}"
    )
    if mean(others) - mean(ones) > noise:
        return best, f"trial {best.number} beat the automatic recipe by more than noise: {figures}"
    return automatic, f"no trial beat the automatic recipe by more than noise: trial {best.number} has {figures}"


def _spread(losses: list[float]) -> float:
    """Of those that did not diverge."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return max(finite) - min(finite)


def show_table(study: Study, chosen: Outcome, display: Display) -> None:
    """Every trial in its order; auto: the automatic recipe."""
    found = study.outcomes()
    names = list(found[0].settings)
    rows: list[list[Styled]] = []
    for each in found:
        figures = ["" if each.loss is None else f"{each.loss:.4f}", str(each.steps), f"{each.seconds:.0f} s"]
        marks = {each.how: each.how != "complete", "auto": each.number == 1, "best": each.number == chosen.number}
        values = (each.settings[name] for name in names)
        cells = [str(each.number), *(f"{v:.2g}" if isinstance(v, float) else str(v) for v in values), *figures]
        cells.append(", ".join(mark for mark, is_so in marks.items() if is_so))
        style = "bold green" if each.number == chosen.number else "" if each.how == "complete" else "dim"
        rows.append([(cell, style) for cell in cells])
    columns = ["", *(_COLUMNS.get(name, name) for name in names), "loss", "steps", "time", ""]
    display.table("Trials, by their best validation losses", columns, rows)


def write_best(path: Path, space: Space, settings: Settings, about: str) -> None:
    """The options of a trial, for `train --config`. about: a line on top."""
    given: Options = space.with_settings(settings)
    options = given.model_dump(by_alias=True, exclude_unset=True)
    kept = {name: value for name, value in options.items() if value is not None and name not in _LEFT_OUT}
    kept = absolute_paths(kept)
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    with atomic_write(path) as temporary:
        temporary.write_text(f"# {about}\n{text}", encoding="utf-8")


def write_plot(path: Path, study: Study) -> None:
    """The losses by trial and, where it was searched, by learning rate."""
    from matplotlib.figure import Figure

    found = study.outcomes()
    shown = [each for each in found if each.loss is not None]
    by_rate = study.space.rates is not None
    figure = Figure(figsize=(10 if by_rate else 5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if by_rate else 1, sharey=True, squeeze=False)[0]
    for how in dict.fromkeys(each.how for each in shown):
        some = [each for each in shown if each.how == how]
        losses = [each.loss for each in some]
        axes[0].scatter([each.number for each in some], losses, color=_COLORS.get(how, "tab:orange"), label=how)
        if by_rate:
            axes[1].scatter([each.settings["learning_rate"] for each in some], losses, color=_COLORS.get(how))
    for each in axes if found[0].loss is not None else ():
        each.axhline(found[0].loss, linestyle="--", color="black", linewidth=1, label="automatic recipe")
    axes[0].set(xlabel="trial", ylabel="best validation loss")
    axes[0].legend()
    if by_rate:
        axes[1].set(xlabel="learning rate", xscale="log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None})

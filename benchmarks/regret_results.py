"""What `benchmarks.regret` tries, what it has measured, and the table of it."""

import json
import math
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from common.files import atomic_write

RESULTS = Path(__file__).parent / "results"
RATES, BATCHES, SMALL_BATCH = (3e-4, 8e-4, 1.6e-3, 3.2e-3), (4, 8), 2
ENOUGH = 24  # runs of a grid that is counted
SEEDS = (1, 2)  # of the best and the automatic run, besides 0
Settings = dict[str, Any]
_DEFAULTS: Settings = {"rank": 16}  # a rule may state it


def epoch_counts(rows: int) -> tuple[int, ...]:
    """Of the grid with so many training rows: few, more, many."""
    return (2, 4, 8) if rows <= 100 else (1, 2, 4)


def grid(rows: int) -> list[Settings]:
    """The settings that are tried with so many training rows: 28, in the same order for any number of rows."""
    counts = epoch_counts(rows)
    points = [*product(counts[1:2], RATES, [SMALL_BATCH]), *product(counts, RATES, BATCHES)]
    return [{"learning_rate": rate, "epochs": count, "batch_size": batch} for count, rate, batch in points]


def rules(rows: int) -> dict[str, Settings]:
    """What others choose for so many training rows; their rank and alpha too.

    fixed: Twintune's plain defaults. Unsloth: its notebooks' LoRA preset, 60 steps. Soup: `decide_lr`, `decide_epochs`
    and `decide_batch_size` of soup-cli 0.77.0. OpenAI: its published rule for epochs, a batch of 0.2 % of the rows.
    """
    return {
        "fixed": {"learning_rate": 2e-4, "epochs": 3, "batch_size": 8},
        "unsloth": {
            **{"learning_rate": 2e-4, "steps": 60, "batch_size": 8, "alpha": 16},
            **{"schedule": "linear", "warmup": 5, "weight_decay": 0.001},
        },
        "soup": {"learning_rate": 3e-4, "epochs": 5 if rows < 500 else 3, "batch_size": 32, "rank": 8, "alpha": 16},
        "openai": {
            "learning_rate": 2e-4,
            "epochs": 3 if rows >= 100 / 3 else min(25, round(100 / rows)),
            "batch_size": max(1, round(rows * 0.002)),
        },
    }


class Results:
    """A model and a data set, and the runs that were made with them.

    about: number of rows and tokens, and what the automatic recipe chooses. runs: settings, seed, validation losses.
    """

    def __init__(self, model: str, data: str) -> None:
        self.model, self.data = model, data
        self.path = RESULTS / f"regret-{model}-{data}.json"
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.about: dict[str, Any] = found.get("about", {})
        self.runs: list[dict[str, Any]] = found.get("runs", [])

    @property
    def grid(self) -> list[Settings]:
        return grid(self.about.get("train rows", 0))

    def of(self, settings: Settings, seed: int = 0) -> dict[str, Any] | None:
        """The run with these settings, where it was made."""
        wanted = _DEFAULTS | settings, seed
        return next((run for run in self.runs if (_DEFAULTS | run["settings"], run["seed"]) == wanted), None)

    def best(self) -> dict[str, Any] | None:
        """The best run of the grid; None before there is one."""
        done = [run for settings in self.grid if (run := self.of(settings)) and run["best"] is not None]
        return min(done, key=lambda run: run["best"], default=None)

    @property
    def done(self) -> int:
        """How many runs of the grid were made."""
        return sum(self.of(settings) is not None for settings in self.grid)

    def complete(self) -> bool:
        """Whether enough runs of the grid were made."""
        return self.done >= ENOUGH

    def regret(self, settings: Settings) -> float:
        """How far the run is above the grid's best, as a share; not a number where one was not made or diverged."""
        run, best = self.of(settings), self.best()
        return run["best"] / best["best"] - 1 if run and run["best"] is not None and best else math.nan

    def regret_over_seeds(self, settings: Settings) -> float:
        """The same of the means over three seeds; the grid's best was chosen by the first of them alone."""
        best = self.best()
        found = [self.seeds(some) for some in (settings, best["settings"])] if best else []
        whole = found and all(len(losses) == 1 + len(SEEDS) for losses in found)
        return mean(found[0]) / mean(found[1]) - 1 if whole else math.nan

    def seeds(self, settings: Settings) -> list[float]:
        """The validation losses of the runs with these settings, by seed."""
        return [run["best"] for seed in (0, *SEEDS) if (run := self.of(settings, seed)) and run["best"] is not None]

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, in the file too."""
        self.runs.append(run)
        RESULTS.mkdir(exist_ok=True)
        with atomic_write(self.path) as temporary:
            lines = ",\n".join(f"    {json.dumps(one)}" for one in self.runs)
            temporary.write_text(f'{{\n  "about": {json.dumps(self.about)},\n  "runs": [\n{lines}\n  ]\n}}\n')


def left_out(pair: Results, pairs: list[Results]) -> tuple[Settings, float] | None:
    """What the other data sets of the model say for this one: `(settings, their regret here)`.

    It is the place in the grid whose mean regret over the others is the least. None where a grid is not complete.
    """
    others = [other for other in pairs if other.model == pair.model and other is not pair and other.complete()]
    if not others or not pair.complete():
        return None
    place = min(
        range(len(pair.grid)),
        key=lambda number: mean(_or_infinite(other.regret(other.grid[number])) for other in others),
    )
    return pair.grid[place], pair.regret(pair.grid[place])


def table(pairs: list[Results]) -> str:
    """Markdown: the best of every pair's grid, how many percent above it each rule is; means of complete grids.

    nats: by how much the automatic recipe's loss is higher. "by the others": the place of the grid that is best for
    the other data sets of the model.
    """
    names = ["auto", "auto over three seeds", *rules(100), "by the others"]
    heads = ["model, data", "rows", "best", "at", "nats", *names, "auto, three seeds", "best, three seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    regrets: dict[str, list[float]] = {name: [] for name in names}
    for pair in pairs:
        best = pair.best()
        if best is None:
            continue
        auto, rows, other = pair.about["auto"], pair.about["train rows"], left_out(pair, pairs)
        found = [
            *(pair.regret(auto), pair.regret_over_seeds(auto), *map(pair.regret, rules(rows).values())),
            other[1] if other else math.nan,
        ]
        for name, regret in zip(names, found, strict=True):
            regrets[name] += [regret] if pair.complete() and not math.isnan(regret) else []
        shown = [*map(_percent, found), *(_spread(pair.seeds(settings)) for settings in [auto, best["settings"]])]
        shown[len(names) - 1] += f" ({_shown(other[0])})" if other else ""
        some = "" if pair.done == len(pair.grid) else f" ({pair.done} of {len(pair.grid)} runs)"
        start = [f"{pair.model}, {pair.data}", str(rows), f"{best['best']:.4f}{some}", _shown(best["settings"])]
        start.append("" if math.isnan(found[0]) else f"{best['best'] * found[0]:+.3f}")
        lines.append(f"| {' | '.join([*start, *shown])} |")
    means = [f"{name} {_percent(mean(found))} ({len(found)})" for name, found in regrets.items() if found]
    return "\n".join([*lines, "", f"On the mean of so many complete pairs: {', '.join(means)}."] if means else lines)


def _or_infinite(regret: float) -> float:
    return math.inf if math.isnan(regret) else regret


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:+.1f} %"


def _shown(settings: Settings) -> str:
    length = f" x {settings['epochs']}" if "epochs" in settings else f", {settings['steps']} steps"
    return f"{settings['learning_rate']:g}{length}, {settings['batch_size']} rows"


def _spread(losses: list[float]) -> str:
    return f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) == 1 + len(SEEDS) else ""

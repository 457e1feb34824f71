"""How far the automatic recipe and others' rules are from the best run of a grid, by validation loss.

    python -m benchmarks.regret --from DIR                    # all pairs of model and data that are not done yet
    python -m benchmarks.regret --models smollm2 --data chat --minutes 30
    python -m benchmarks.regret --table                       # what was measured, as Markdown

Every run is written as soon as it ends, to benchmarks/results/regret-MODEL-DATA.json, and a run that is written is not
done again: stop it at any time, and start it again. A run whose validation loss is 5 % above its best three times in a
row ends there, as its best will not change; --patience holds as in train. --from: folder of the public sets, with
identity/identity.json (LLaMA-Factory's, Apache-2.0) and wikisql/{train,valid}.jsonl (mlx-examples', BSD-3-Clause).
"""

import argparse
import importlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.regret_data import SETS, data_set, write_set
from benchmarks.regret_results import SEEDS, Results, Settings, rules, table
from common.backend import Memory
from common.commands.prepare import choose_hardware
from common.context import Context
from common.data.batching import steps_per_epoch
from common.data.encode import load_tokenizer
from common.data.training_rows import encode_data, read_data
from common.display import Display
from common.models.training_base import find_base
from common.options import Options
from common.training.auto_recipe import auto_recipe
from common.training.faults import NotFinite
from common.training.loop import Interrupted
from common.training.trials import Trials

MODELS = {
    "smollm2": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "gemma3": {"model": "google/gemma-3-270m", "chat_template": "gemma"},
}
AUTO = ("learning_rate", "epochs", "batch_size", "rank")  # what the automatic recipe chooses
PRECISION = "bf16"  # of a pair that is begun
_OVER, _TIMES = 1.05, 3  # a run ends when its loss is so many times its best, so often in a row


class _Watcher:
    """The loop's observer: keeps the validation losses, and ends a run that has only got worse."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def step(self, line: dict, memory: Memory) -> None:
        """Of no interest here."""

    def evaluation(self, line: dict) -> None:
        self.losses.append((line["step"], round(line["valid_loss"], 5)))

    def say(self, text: str) -> None:
        """Of no interest here."""

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def stop_requested(self) -> bool:
        best = min((loss for _, loss in self.losses), default=0.0)
        return len(self.losses) > _TIMES and all(loss > _OVER * best for _, loss in self.losses[-_TIMES:])


class Pair(Results):
    """Results, and how to get more of them."""

    def measure(self, public: Path | None, ends: float) -> None:
        """Do the runs that are not done, until the clock says `ends`: last the automatic one and the best once more."""
        with tempfile.TemporaryDirectory() as folder:
            write_set(data_set(self.data, public), Path(folder))
            trials = self._trials(folder)
            auto, rows = self.about["auto"], self.about["train rows"]
            self._add_all(trials, [auto, *rules(rows).values(), *self.grid], 0, ends)
            best = self.best()
            for seed in SEEDS:
                self._add_all(trials, [auto, best["settings"]] if best else [], seed, ends)
            trials.close()

    @property
    def precision(self) -> str:
        """Of all runs of the pair."""
        found: str = self.about.get("precision", PRECISION)
        return found

    def _add_all(self, trials: Trials, settings: list[Settings], seed: int, ends: float) -> None:
        for some in settings:
            if self.of(some, seed) is None and time.monotonic() < ends:
                with tempfile.TemporaryDirectory() as folder:
                    self._add(trials, some, seed, Path(folder))

    def _options(self, **more: Any) -> Options:
        return Options(**MODELS[self.model], precision=self.precision, eval_rows=0, **more)

    def _trials(self, folder: str) -> Trials:
        context = Context(backend_named, Display("quiet"))
        options = self._options(data=folder)
        hardware = choose_hardware(options, context)
        backend, device = hardware.backend.value, hardware.device.value
        base = find_base(options, backend, "none", context.display)
        tokenizer = load_tokenizer(base.model.path, options.chat_template)
        rows = encode_data(options, read_data(options, context.display), tokenizer, lambda share, text: None)
        train = rows.train.rows
        self.about = {
            "train rows": len(train),
            "valid rows": len(rows.scored),
            "tokens": int(train.lengths.sum()),
            "label tokens": int(train.label_tokens.sum()),
            "precision": self.precision,
            "auto": auto_recipe(options, base, train)[0].model_dump(include={*AUTO}),
        }
        return Trials(context, base, rows, backend, device, self.precision)

    def _add(self, trials: Trials, settings: Settings, seed: int, folder: Path) -> None:
        rows, watcher, began = trials.rows.train.rows, _Watcher(), time.perf_counter()
        per_epoch = steps_per_epoch(len(rows), settings["batch_size"])
        times = 2 if len(rows) >= 4 * len(trials.rows.scored) else 1  # an epoch is validated: it costs a fifth at most
        options = self._options(data="regret", eval_every=max(1, round(per_epoch / times)), seed=seed, **settings)
        ended = ""
        try:
            trials.train(options, folder, watcher)
        except Interrupted:
            pass
        except NotFinite as error:
            ended = error.what
        step, best = min((entry for entry in watcher.losses if entry[0]), key=lambda entry: entry[1], default=(0, None))
        run = {
            **{"settings": settings, "seed": seed, "best": best, "step": step, "losses": watcher.losses},
            **({"ended": ended} if ended else {}),
            **{"seconds": round(time.perf_counter() - began, 1), "environment": environment(trials)},
        }
        self.add(run)
        print(
            f"{self.model} {self.data} {settings}, seed {seed}: {best} after step {step}, {run['seconds']} s",
            flush=True,
        )


def backend_named(name: str) -> Any:
    return importlib.import_module(f"{name}_backend")


def environment(trials: Trials) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S607
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "host": f"{trials.device}, {model.partition(':')[2].strip() or model}",
        "backend": f"{trials.backend} {version(trials.backend)}",
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regret")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--data", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--from", type=Path, dest="public", metavar="DIR", help="folder of the public sets")
    parser.add_argument("--minutes", type=float, default=np.inf, help="begin no run after so long")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    given = parser.parse_args()
    pairs = [Pair(model, data) for model, data in product(given.models, given.data)]
    if not given.table:
        ends = time.monotonic() + 60 * given.minutes
        for pair in pairs:
            if time.monotonic() < ends:
                pair.measure(given.public, ends)
    print(table(pairs))


if __name__ == "__main__":
    main()

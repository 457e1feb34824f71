"""The run folder's record, and `compare`."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from common import strict_json
from common.checkpoint import State
from common.config import Plan, Recipe
from common.errors import UserError
from common.families import end_to_end
from common.memory import total
from common.progress import Display, gigabytes

PACKAGES = ("torch", "transformers", "peft", "mlx", "mlx-lm", "numpy", "safetensors", "tokenizers", "twintune")


def read_run(run: Path, *needed: str) -> dict[str, Any]:
    """run.json. Raises UserError where the folder holds no run, or its record lacks a key of `needed`.

    A run may be a stranger's, so the one option that names a program, `llama_cpp`, is never among its `options`; it
    stands under `named_llama_cpp`, for say_llama.
    """
    try:
        content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run} holds no run (no run.json).", "Give a folder that `train` made.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{run / 'run.json'} is damaged: {error}", "Give another run.") from None
    if not isinstance(content, dict) or (missing := set(needed) - content.keys()):
        lacks = f": it lacks {', '.join(sorted(missing))}" if isinstance(content, dict) else ""
        raise UserError(f"{run / 'run.json'} is no run's record{lacks}.", "Give a folder that `train` made.")
    if isinstance(options := content.get("options"), dict):
        content["named_llama_cpp"] = options.pop("llama_cpp", None)
    return content


def say_llama(known: dict[str, Any], given: str | None, display: Display) -> None:
    """Say so where a run was made with a llama.cpp of its own and none is given now. `known`: read_run's."""
    if (named := known.get("named_llama_cpp")) and given is None:
        display.say(
            f"The run was made with --llama-cpp {named!r}. A program is never taken from a run's record: to use that "
            "one again, give the option again."
        )


def read_complete(run: Path, *needed: str) -> dict[str, Any]:
    """run.json of a run that is trained to its end. Raises UserError where it is not, and as `read_run`."""
    known = read_run(run, "status", *needed)
    if known["status"] != "complete":
        raise UserError(f"{run} has not finished training.", f"Finish it: python cli.py train --resume {run}")
    return known


def update_run(run: Path, **facts: Any) -> dict[str, Any]:
    """Merge `facts` into run.json, atomically."""
    path = run / "run.json"
    content = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | facts
    temporary = run / "run.json.tmp"
    temporary.write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return content


def write_environment(run: Path) -> None:
    """environment.json: versions and machine; no names, no paths, no tokens."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    content = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": chip(),
        "cores": os.cpu_count(),
        "memory_bytes": total(),
        "packages": versions,
    }
    (run / "environment.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def chip() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def figures(state: State, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The part of run.json that comes out of training. Speeds leave out first steps and evaluation."""
    timed = state.timed_seconds or None
    return {
        "recipe_hash": recipe.hash(),
        "backend": plan.backend,
        "device": plan.device,
        "steps": state.step,
        "tokens": state.tokens,
        "label_tokens": state.label_tokens,
        "train_seconds": state.train_seconds,
        "tokens_per_second": state.timed_tokens / timed if timed else None,
        "label_tokens_per_second": state.timed_label_tokens / timed if timed else None,
        # of the positions that attention computes; the layers' products see no padding but a graph's
        "padding_fraction": 1 - state.tokens / state.padded_tokens if state.padded_tokens else 0.0,
        "final_train_loss": state.train_loss,
        "best_valid_loss": state.best_valid_loss,
        "best_step": state.best_step,
    }


def deterministic(recipe: Recipe, plan: Plan, config: dict[str, Any]) -> dict[str, str]:
    """What of a run comes out the same again, and how nearly."""
    same = "the same bits on the same machine with the same plan and packages"
    exact = plan.device == "cpu" or end_to_end(config, plan.device, recipe.precision)
    return {
        "row order, adapter start, hold-out": "drawn by numpy from the seed: the same everywhere",
        "training": same if exact else "up to the rounding of the GPU's kernels",
        "another plan or backend": "the same mathematics, other rounding"
        + ("; dropout masks differ between backends" if recipe.dropout else ""),
        "fused weights": "the same bytes on any machine, from the same adapter and base"
        + ("" if recipe.quantization == "none" else "; into dequantised weights as its own backend makes them"),
    }


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what happens within to `seconds[name]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def compare(runs: list[Path], display: Display) -> None:
    """Print a table of the runs: recipe agreement first, then figures, each with its ratio to the first run's."""
    records = [read_run(run, "recipe_hash", "backend", "device") for run in runs]
    for run, record in zip(runs, records, strict=True):
        if record.get("status") != "complete":
            raise UserError(f"{run} has not finished training.", f"Finish it: python cli.py train --resume {run}")
    recipes = [read_recipe(run) for run in runs]
    rows = [["recipe", *[record["recipe_hash"][:12] for record in records]]]
    rows.append(["agrees", "-", *["yes" if r.hash() == recipes[0].hash() else "NO" for r in recipes[1:]]])
    for name in ("backend", "device"):
        rows.append([name, *[str(record[name]) for record in records]])
    rows.append(["precision", *[recipe.precision for recipe in recipes]])
    for label, key, show in (
        ("tokens/s", "tokens_per_second", "{:.1f}"),
        ("label tokens/s", "label_tokens_per_second", "{:.1f}"),
        ("train time, s", "train_seconds", "{:.1f}"),
        ("foretold peak memory", "predicted_peak_bytes", "GB"),
        ("peak memory", "peak_memory_bytes", "GB"),
        ("peak RSS", "peak_rss_bytes", "GB"),
        ("padding (in attention only)", "padding_fraction", "{:.2%}"),
        ("final train loss", "final_train_loss", "{:.4f}"),
        ("best valid loss", "best_valid_loss", "{:.4f}"),
        ("best step", "best_step", "{}"),
    ):
        rows.append([label, *_with_ratios([record.get(key) for record in records], show)])
    shares = [stage_shares(record) for record in records]
    for stage in dict.fromkeys(name for share in shares for name in share):
        rows.append([f"time: {stage}", *[f"{share[stage]:.1%}" if stage in share else "-" for share in shares]])
    display.table("Compared with the first run", ["", *[run.name for run in runs]], rows)
    for run, recipe in zip(runs[1:], recipes[1:], strict=True):
        display.say(_agreement(runs[0], recipes[0], run, recipe))
    for run, record in zip(runs, records, strict=True):
        if len(plans := record.get("plans", [])) > 1:
            moves = ", ".join(f"{p['backend']} on {p['device']} from step {p['from_step']}" for p in plans)
            display.say(f"{run.name} changed its plan on the way ({moves}): its speed and memory are a mixture.")
    kinds = {record.get("memory_kind") for record in records}
    if len(kinds) > 1:
        display.say(
            f"peak memory is counted in different ways here ({', '.join(sorted(map(str, kinds)))}): "
            "compare peak RSS, the process's peak in every run."
        )


def stage_shares(record: dict[str, Any]) -> dict[str, float]:
    """Each stage's share of a run's time, in the order in which they came."""
    seconds = record.get("stage_seconds", {})
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()} if whole else {}


def _with_ratios(values: list[float | None], show: str) -> list[str]:
    cells = []
    for value in values:
        if value is None:
            cells.append("-")
            continue
        text = gigabytes(value) if show == "GB" else show.format(value)
        first = values[0]
        cells.append(f"{text}  ({value / first:.2f}x)" if cells and first and show != "{}" else text)
    return cells


def _agreement(first_run: Path, first: Recipe, run: Path, recipe: Recipe) -> str:
    if recipe.hash() == first.hash():
        text = f"{run.name}: the same recipe as {first_run.name}: the same curve up to rounding, so speeds compare."
        if recipe.dropout:
            text += " Dropout masks differ between frameworks, so the curves agree only statistically."
        return text
    one, other = first.model_dump(), recipe.model_dump()
    differing = [f"{k} {one[k]} / {other[k]}" for k in one if one[k] != other[k] and k not in ("model", "data")]
    return f"{run.name}: NOT the same recipe as {first_run.name}, the losses do not compare: {'; '.join(differing)}"


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no whole run: it has no {path.name}.", "Give the whole folder.") from None


def read_plan(run: Path) -> Plan:
    return Plan.model_validate(_yaml(run / "plan.yaml"))


def read_recipe(run: Path) -> Recipe:
    return Recipe.model_validate(_yaml(run / "recipe.yaml"))

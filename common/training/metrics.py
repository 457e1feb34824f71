"""The figures that training puts on record, its metrics.jsonl, and how its time is counted."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.documents import read_json_lines
from common.files import atomic_write
from common.recipe import Plan, Recipe
from common.training.checkpoint import State


def figures(state: State, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Fields of RunRecord that training determines. Speeds leave out first steps and validation."""
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
        # of the positions that attention computes; matrix products see no padding except that of a CUDA graph
        "padding_fraction": 1 - state.tokens / state.padded_tokens if state.padded_tokens else 0.0,
        "final_train_loss": state.train_loss,
        "start_valid_loss": state.start_valid_loss,
        "best_valid_loss": state.best_valid_loss,
        "best_step": state.best_step,
    }


def deterministic(recipe: Recipe, exact: bool) -> dict[str, str]:
    """Which results of a run are reproducible, and how exactly. exact: training gives the same bits again."""
    same = "the same bits on the same machine with the same plan, packages and number of threads"
    return {
        "row order, adapter start, validation split": "drawn by numpy from the seed: the same everywhere",
        "training": same if exact else "up to the rounding of the GPU's kernels",
        "another plan or backend": "the same mathematics, other rounding"
        + ("; dropout masks differ between backends" if recipe.dropout else ""),
        "fused weights": "the same bytes on any machine, from the same adapter and base"
        + ("" if recipe.quantization == "none" else "; into dequantized weights as its own backend makes them"),
    }


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time of the block to `seconds[name]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


class Metrics:
    """A file of lines by step, open for appending. What the disk refuses is written with the next line."""

    def __init__(self, path: Path, step: int, unvalidated: bool, warn: Callable[[str], None]) -> None:
        """The lines of what a resumed run will do again are removed.

        Those are the steps after `step` and, where `step` is `unvalidated` or 0, the validation after it. `warn` hears
        once of a disk that refuses lines.
        """
        kept = [line for line in _lines(path) if line["step"] <= step]
        if unvalidated or not step:
            kept = [line for line in kept if line["step"] < step or "loss" in line]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.path, self._warn, self._left, self._refused = path, warn, b"", False
        self._file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        self._left += json.dumps(line).encode() + b"\n"
        try:
            self._write_left()
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._warn(f"{self.path}: {error.strerror}; training continues, and its lines are written later")
            self._refused = True

    def close(self) -> None:
        try:
            self._write_left()
        except OSError:
            lines = self._left.count(b"\n")
            self._warn(f"{self.path} lacks its last {lines} lines: the disk refuses them")
        self._file.close()

    def _write_left(self) -> None:
        while self._left:  # a disk that is nearly full takes part of a line
            self._left = self._left[self._file.write(self._left) :]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The file's lines, those that name no step left out."""
    try:
        lines = read_json_lines(path, "Remove it: no result depends on it.")
    except FileNotFoundError:
        return []
    return [line for line in lines if isinstance(line.get("step"), int)]

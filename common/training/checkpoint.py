"""Checkpoints: complete or not there at all; a damaged one is skipped for the one before.

step-000040/
  adapter/ optimizer.safetensors state.json   where the run stood after the step; adapter/ in PEFT's layout
  best/             the adapter with the best validation loss until then, of an earlier step
  COMPLETE          written last: the hashes of all these
  evaluation.json   written later, where the validation after this step was done: its outcome
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError, create_model

from common.backend import Adapter, OptimizerState, StepResult
from common.documents import fault_of, read_json
from common.errors import UserError
from common.files import atomic_folder, atomic_write, file_digest
from common.lazy_arrays import joined, part_of, shapes_of
from common.models.adapter_files import read_trained, write_trained
from common.models.safetensors_files import lazy_tensors, save_tensors
from common.recipe import Parent, Plan

_STEP = re.compile(r"step-\d{6,}")
_STATE = "state.json"
_MARKER = "COMPLETE"
_EVALUATION = "evaluation.json"
_EVALUATED = ("evaluated", "best_valid_loss", "best_step")  # what a validation changes of the state


@dataclass
class State:
    """Where a run stands. Order of rows, schedule and dropout follow from `step` and the recipe alone."""

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    padded_tokens: int = 0
    train_seconds: float = 0.0
    timed_seconds: float = 0.0  # without each process's first step
    timed_tokens: int = 0
    timed_label_tokens: int = 0
    micro_batch_tokens: int = 0  # the plan's, or less after an out-of-memory
    gradient_checkpointing: bool = False  # the plan's, or switched on after an out-of-memory
    train_loss: float | None = None  # of the last step
    start_valid_loss: float | None = None  # before the first step
    evaluated: int = 0  # the last step after which validation was done
    best_valid_loss: float | None = None
    best_step: int | None = None
    best: Adapter | None = field(default=None, repr=False)

    @staticmethod
    def before_training(plan: Plan) -> "State":
        return State(micro_batch_tokens=plan.micro_batch_tokens, gradient_checkpointing=plan.gradient_checkpointing)

    def count(self, step: int, result: StepResult, loss: float, seconds: float, timed: bool) -> None:
        """Add a finished step. timed: whether it counts for the speed; a process's first step warms up."""
        self.step, self.train_loss = step, loss
        self.tokens += result.tokens
        self.label_tokens += result.label_tokens
        self.padded_tokens += result.padded_tokens
        self.train_seconds += seconds
        if timed:
            self.timed_seconds += seconds
            self.timed_tokens += result.tokens
            self.timed_label_tokens += result.label_tokens


# What state.json must hold. Its other fields, another version's, are passed over.
_STATE_FIELDS: dict[str, Any] = {known.name: (known.type, known.default) for known in fields(State)}
_STATE_FIELDS |= {"optimizer_step": (int, ...), "layers": (int, ...), "recipe_hash": (str | None, None)}
del _STATE_FIELDS["best"]
_StateFile = create_model("_StateFile", **_STATE_FIELDS)


class Checkpoint(NamedTuple):
    """Where a run stood after a step: all that training needs to continue. Its arrays are read from its files."""

    state: State
    adapter: Adapter
    optimizer: OptimizerState

    def require_fit(self, start: Adapter | None) -> None:
        """Raises UserError where this is no later state of `start`: a stranger may have made its files.

        start: the adapter that the recipe begins with; None for full fine-tuning.
        """
        trained = shapes_of(self.adapter.arrays())
        known = {} if start is None else shapes_of(start.arrays())
        fits = start is None or self.adapter.weights.keys() == start.weights.keys()
        fits = fits and known.items() <= trained.items()  # a magnitude may not be known before the model is loaded
        if not fits or any(shapes_of(m) != trained for m in (self.optimizer.exp_avg, self.optimizer.exp_avg_sq)):
            raise UserError(
                f"The checkpoint of step {self.state.step} holds other tensors than the recipe trains.",
                "Remove its folder to continue from the checkpoint before it; or start a new run. A run with --layers "
                "that an older version began may need that version (environment.json names it).",
            )


def save(run: Path, state: State, adapter: Adapter, optimizer: OptimizerState, recipe_hash: str, keep: int) -> Path:
    """`checkpoints/step-000040`, complete or not there at all. `prune` follows."""
    folder = _folder(run, state.step)
    with atomic_folder(folder) as temporary:
        write_trained(temporary, adapter)
        if state.best is not None:
            write_trained(temporary / "best", state.best)
        moments = joined({"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq})
        save_tensors(moments, temporary / "optimizer.safetensors", {"step": str(optimizer.step)})
        plain = {n: value for n, value in asdict(State(**{**vars(state), "best": None})).items() if n != "best"}
        plain |= {"optimizer_step": optimizer.step, "layers": adapter.layers, "recipe_hash": recipe_hash}
        (temporary / _STATE).write_text(json.dumps(plain, indent=2))
        hashes = {str(path.relative_to(temporary)): file_digest(path) for path in _files(temporary)}
        (temporary / _MARKER).write_text(json.dumps(hashes, indent=2))
    prune(run, state.step, keep)
    return folder


def prune(run: Path, step: int, keep: int) -> None:
    """Keep the checkpoint of `step` and the `keep - 1` before it: a later one was damaged, and passed over."""
    found = _folders(run)
    kept = [other for other in found if _step_of(other) <= step][:keep]
    for other in found:
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def add_evaluation(run: Path, state: State, keep: int) -> None:
    """Put the outcome of the validation after `state.step` into that step's checkpoint, in one rename; then `prune`.

    The best adapter need not be written: where this validation found it, it is the checkpoint's own.
    """
    with atomic_write(_folder(run, state.step) / _EVALUATION) as temporary:
        temporary.write_text(json.dumps({name: getattr(state, name) for name in _EVALUATED}))
    prune(run, state.step, keep)


def discard(run: Path, step: int) -> None:
    """Remove the checkpoint of `step`, where there is one."""
    shutil.rmtree(_folder(run, step), ignore_errors=True)


def discard_stale(run: Path, recipe_hash: str, parent: Parent) -> None:
    """Remove what other recipes made after the step where the recipe continues its parent: a rollback left it."""
    for folder in _folders(run):
        if _step_of(folder) > parent.step and (folder / _STATE).exists():
            own = _read_state(folder, f"Remove {folder}.").get("recipe_hash")  # its weights need not be read
            if isinstance(own, str) and own != recipe_hash:
                shutil.rmtree(folder, ignore_errors=True)


def recipe_at(run: Path, step: int) -> str | None:
    """The hash of the recipe that made the step's checkpoint; None where that is not complete, or does not say."""
    folder = _folder(run, step)
    own = _read_state(folder, f"Remove {folder}.").get("recipe_hash") if _complete(folder) else None
    return own if isinstance(own, str) else None


def step_before(run: Path, step: int) -> int | None:
    """The newest step before `step` that has a complete checkpoint."""
    return next((_step_of(folder) for folder in _folders(run) if _step_of(folder) < step and _complete(folder)), None)


def latest(
    run: Path,
    recipe_hash: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
    parent: Parent | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that is complete, None where there is none; `warn` gets a line for newer ones that are not.

    Raises UserError where it was made by another recipe than that of `recipe_hash`, and not by its parent at the step
    where the recipe continues that one. A checkpoint of an older version does not know its recipe, and is taken.
    """
    folders = _folders(run)
    folder = next((folder for folder in folders if _complete(folder)), None)
    damaged = folders[0] if folders and folder != folders[0] else None
    if damaged is not None:
        lost = _step_of(damaged) - (_step_of(folder) if folder else 0)
        after = f"from step {_step_of(folder)}" if folder else "from the start"
        warn(f"{damaged} is damaged: training continues {after}, and at least {lost} steps are done again")
    if folder is None:
        return None
    remedy = f"Remove {folder} to continue from the checkpoint before it; or start a new run."
    plain = _read_state(folder, remedy)
    if missing := [name for name in ("step", "optimizer_step", "layers") if name not in plain]:
        raise UserError(f"{folder / _STATE} has no {missing[0]}: another version of Twintune wrote it.", remedy)
    own = plain.get("recipe_hash")
    continued = parent is not None and (own, plain["step"]) == (parent.recipe, parent.step)
    if None not in (own, recipe_hash) and own != recipe_hash and not continued:
        raise UserError(
            f"{folder} was made by another recipe ({str(own)[:12]}) than the run's ({str(recipe_hash)[:12]}).",
            remedy,
        )
    plain.setdefault("evaluated", plain["step"])  # an older version saved only after the validation
    plain |= _evaluation(folder)
    try:
        _StateFile.model_validate(plain, strict=True)
    except ValidationError as error:
        raise UserError(f"{folder / _STATE} cannot be read by this version{fault_of(error)}.", remedy) from None
    of_this_step = plain.get("best_step") == plain["step"]
    best = folder if of_this_step else folder / "best"
    moments = lazy_tensors(folder / "optimizer.safetensors", remedy)
    layers, names = plain["layers"], {known.name for known in fields(State)} - {"best"}
    optimizer = OptimizerState(plain["optimizer_step"], *(part_of(moments, name) for name in ("exp_avg", "exp_avg_sq")))
    state = State(**{name: value for name, value in plain.items() if name in names})  # a newer version may have more
    state.best = read_trained(best, layers).copied() if best.is_dir() else None
    return Checkpoint(state, read_trained(folder, layers), optimizer)


def outlasting(run: Path, step: int, adapter: Adapter) -> Adapter:
    """What a backend has trained until `step`, for when it trains on or is closed: out of the checkpoint, or a copy."""
    folder = _folder(run, step)
    return read_trained(folder, adapter.layers) if adapter.full and _complete(folder) else adapter.copied()


def _read_state(folder: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_json(folder / _STATE, remedy, allow_nan=True)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {_STATE}.", remedy) from None


def latest_recipe(run: Path, recipe_hash: str) -> Parent | None:
    """The recipe and the step of the newest checkpoint that is complete; None where there is none.

    recipe_hash: the run's, for a checkpoint of an older version, which does not know its recipe.
    """
    for folder in _folders(run):
        if _complete(folder):
            own = _read_state(folder, f"Remove {folder}.").get("recipe_hash")
            return Parent(recipe=own if isinstance(own, str) else recipe_hash, step=_step_of(folder))
    return None


def latest_step(run: Path) -> int | None:
    """The step of the newest checkpoint, whose contents are not looked at; None where there is none."""
    steps = [_step_of(folder) for folder in _folders(run) if (folder / _MARKER).exists()]
    return steps[0] if steps else None


def _evaluation(folder: Path) -> dict[str, Any]:
    """The outcome of the validation after the checkpoint's step; nothing where it was not done, or is unreadable."""
    try:
        found = read_json(folder / _EVALUATION, "", allow_nan=True)
        return {name: found[name] for name in _EVALUATED}
    except (OSError, UserError, KeyError):
        return {}


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def _folders(run: Path) -> list[Path]:
    """Newest first, unfinished ones left out."""
    found = [folder for folder in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(folder.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _complete(folder: Path) -> bool:
    try:
        hashes = read_json(folder / _MARKER, "")
        found = {str(path.relative_to(folder)): path for path in _files(folder)}  # nothing else is opened
        return bool(hashes) and all(n in found and file_digest(found[n]) == digest for n, digest in hashes.items())
    except (OSError, UserError):
        return False

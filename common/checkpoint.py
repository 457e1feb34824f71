"""Checkpoints: written whole or not at all, and a damaged one is passed over for the one before."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from common.adapter import read_trained, write_both, write_trained
from common.seam import Adapter, OptimizerState

KEPT = 2  # the newest checkpoints that stay on disk
_MARKER = "COMPLETE"  # written last: the files' hashes


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
    best_valid_loss: float | None = None
    best_step: int | None = None
    best: Adapter | None = field(default=None, repr=False)


def save(run: Path, state: State, adapter: Adapter, optimizer: OptimizerState) -> Path:
    """`checkpoints/step-000040`: a temporary folder, synced, its marker last, renamed. Older ones are then removed."""
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    for left in folder.parent.glob("*.tmp"):  # of a process that was killed
        shutil.rmtree(left)
    temporary.mkdir(parents=True)
    write_both(temporary, adapter)
    if state.best is not None:
        write_trained(temporary / "best", state.best)
    moments = {f"exp_avg.{name}": array for name, array in optimizer.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": array for name, array in optimizer.exp_avg_sq.items()}
    save_file(moments, temporary / "optimizer.safetensors", metadata={"step": str(optimizer.step)})
    plain = {name: value for name, value in asdict(State(**{**vars(state), "best": None})).items() if name != "best"}
    plain |= {"optimizer_step": optimizer.step, "layers": adapter.layers}
    (temporary / "state.json").write_text(json.dumps(plain, indent=2))
    hashes = {str(path.relative_to(temporary)): _digest(path) for path in _files(temporary)}
    for path in _files(temporary):
        _sync(path)
    (temporary / _MARKER).write_text(json.dumps(hashes, indent=2))
    _sync(temporary / _MARKER)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _sync(folder.parent)
    for old in _folders(run)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> tuple[State, Adapter, OptimizerState] | None:
    """The newest checkpoint that is whole; None where there is none."""
    for folder in _folders(run):
        if _complete(folder):
            break
    else:
        return None
    plain = json.loads((folder / "state.json").read_text())
    optimizer_step, layers = plain.pop("optimizer_step"), plain.pop("layers")
    best = read_trained(folder / "best", layers) if (folder / "best").is_dir() else None
    moments = load_file(folder / "optimizer.safetensors")

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in moments.items() if name.startswith(prefix)}

    optimizer = OptimizerState(optimizer_step, part("exp_avg."), part("exp_avg_sq."))
    return State(**plain, best=best), read_trained(folder, layers), optimizer


def _folders(run: Path) -> list[Path]:
    """Newest first, unfinished ones left out."""
    return sorted((run / "checkpoints").glob("step-??????"), reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _complete(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / _MARKER).read_text())
        return bool(hashes) and all(_digest(folder / name) == digest for name, digest in hashes.items())
    except (OSError, json.JSONDecodeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

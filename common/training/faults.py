"""Errors that end a training, each with the checkpoint that it continues from."""

from collections.abc import Sequence
from pathlib import Path

from common.data.encode import Encoded
from common.errors import PROGRAM, UserError, os_fault
from common.training import checkpoint


class NotFinite(UserError):
    """Training has diverged, or computes with broken figures."""


class Unwritten(NotFinite):
    """A figure is exactly 0: the device did not write it."""


def not_finite(
    run: Path, step: int, rows: Sequence[Encoded], what: str = "loss or its gradient", is_: str = "not finite"
) -> NotFinite:
    kind = NotFinite if is_ == "not finite" else Unwritten
    more = f" and {len(rows) - 32} more" if len(rows) > 32 else ""
    sources = ", ".join(row.source for row in rows[:32]) + more
    if not step:
        fix = "Look at those rows; try another --precision; check the model's files."
        return kind(f"The {what} is {is_} before the first step, on the rows {sources}.", fix)
    saved = checkpoint.latest_step(run)
    kept = "No checkpoint had been written yet" if saved is None else f"The checkpoint of step {saved} is kept"
    return kind(
        f"The {what} is {is_} at step {step}, on the rows {sources}. {kept}.",
        "Lower --learning-rate or raise --warmup; look at those rows; on a GPU try --precision fp32, or a lower "
        "--memory-limit (Metal was seen to continue with wrong numbers where memory ran out).",
    )


def unsaved(run: Path, error: OSError) -> UserError:
    """For a checkpoint, or another file of the run, that the disk refused."""
    saved = checkpoint.latest_step(run)
    place = "begin again, as no step was saved" if saved is None else f"continue from step {saved}"
    return os_fault(error, f"{place}: {PROGRAM} train --resume {run}")

"""Validation: the loss over the validation rows, and what follows from it."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.backend import Backend, Batch, OutOfMemory, StepResult
from common.data.batching import micro_batches
from common.data.encode import Encoded
from common.recipe import Plan, Recipe
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.faults import not_finite
from common.training.short_memory import ShortMemory

_HARDLY_ANY = 1e-3  # mean loss


@dataclass
class Validation:
    """The validation of a run's state. rows: to validate on. run: its folder."""

    backend: Backend
    recipe: Recipe
    plan: Plan
    rows: Sequence[Encoded]
    run: Path
    state: State
    memory: ShortMemory
    _cut: tuple[int, list[Batch]] = field(default=(0, []), init=False)  # the rows, cut for that size

    def loss(self, stop: Callable[[], bool]) -> float | None:
        """Of the adapter as it is now; None where a stop was asked for.

        Raises UserError for a loss that is not finite, or memory that no smaller micro-batch saves.
        """
        state = self.state
        while True:
            size = state.micro_batch_tokens
            try:
                if self._cut[0] != size:
                    self._cut = size, self._micro_batches(size)
                loss = evaluate(self.backend, self._cut[1], stop)
                break
            except OutOfMemory:
                after = f"after step {state.step}" if state.step else "before the first step"
                what = f"the validation {after} ran out of memory"
                self.memory.use_less(self._micro_batches(size), what)
        if loss is not None and not math.isfinite(loss):
            checkpoint.discard(self.run, state.step)  # nothing can continue from such weights
            raise not_finite(self.run, state.step, self.rows, "validation loss")
        if loss == 0 and not nothing_to_learn(self.backend, self.rows, self.plan.device):
            raise not_finite(self.run, state.step, self.rows, "validation loss", "exactly 0")
        return loss

    def _micro_batches(self, size: int) -> list[Batch]:
        """The ranks share the rows of each, evenly in their number: so none has more than `size` tokens of it."""
        return micro_batches(self.rows, size * (self.plan.ranks + 1) // 2, self.plan.device)

    def keep(self, loss: float) -> None:
        """Take this loss of `state.step` into the state, and the adapter too if it is better than the best so far."""
        state = self.state
        state.evaluated = state.step
        if state.best_valid_loss is None or loss < state.best_valid_loss * (1 - self.recipe.min_delta):
            state.best_valid_loss, state.best_step, state.best = loss, state.step, self.backend.get_adapter().copied()


def no_better(state: State, recipe: Recipe) -> bool:
    """Whether the last validations, as many as --patience says, were no better than the best before them."""
    if not recipe.patience or state.best_step is None:
        return False
    since = max(state.best_step, recipe.parent.step if recipe.parent else 0)
    return state.evaluated - since >= recipe.patience * recipe.eval_every


def worse_than_start(state: State) -> bool:
    """Whether the best validation was no better than the one before the first step."""
    start, best = state.start_valid_loss, state.best_valid_loss
    return start is not None and best is not None and best >= start


def evaluate(backend: Backend, batches: list[Batch], stop: Callable[[], bool] = lambda: False) -> float | None:
    """Weighted mean loss over all label tokens; None where `stop` asked for it between two micro-batches."""
    results: list[StepResult] = []
    for batch in batches:
        if stop():
            return None
        results.append(backend.eval_step(batch))
        if len(results) > 1:
            float(results[-2].loss_sum)  # stay one micro-batch ahead of the device, so that a stop comes in time
    return sum(float(r.loss_sum) for r in results) / sum(r.weight_sum for r in results)


def nothing_to_learn(backend: Backend, rows: Sequence[Encoded], device: str) -> bool:
    """Whether a loss of exactly 0 may be true: the rows, one at a time, have hardly any.

    A device that ran out of memory leaves arrays unwritten, and an unwritten figure reads as 0.
    """
    with suppress(OutOfMemory):
        loss = evaluate(backend, micro_batches(rows, 1, device))
        return loss is not None and loss < _HARDLY_ANY
    return False

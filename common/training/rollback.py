"""Back to an earlier step at half the learning rate: what `--on-collapse rollback` does to a run."""

from dataclasses import replace

import numpy as np

from common.backend import Adapter, OptimizerState
from common.recipe import Parent, Plan, Recipe
from common.run_fields import RollbackRecord
from common.run_record import Run
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted
from common.training.validation import worse_than_start

MOST = 3  # rollbacks of a run: an eighth of its learning rate


class RolledBack(Interrupted):
    """The run has collapsed, and `roll_back` can help it. since: the step from which on that was seen."""

    def __init__(self, run: Run, since: int) -> None:
        super().__init__(run)
        self.run, self.since = run, since


def roll_back(run: Run, recipe: Recipe, plan: Plan, state: State, since: int) -> str:
    """Have the run resume from an earlier step, by a recipe of half the learning rate whose parent is the present one.

    since: the step from which on the collapse was seen. A kill at any moment leaves a run that resumes, before the
    rollback or after it. Returns what was done, in a line.
    """
    record, rate, to_step = run.record, recipe.learning_rate / 2, _target(run, state, since)
    again = recipe.parent is not None and recipe.parent.step == to_step
    begun = recipe.parent.recipe if recipe.parent and again else recipe.hash()  # whose curve it has until then
    if to_step:
        made_by = checkpoint.recipe_at(run.path, to_step)
        if made_by is None and state.best is not None:
            kept = replace(state, step=to_step, evaluated=to_step, best=None)
            checkpoint.save(run.path, kept, state.best, _fresh(state.best), begun, plan.keep_checkpoints)
        begun = made_by or begun
    parent = Parent(recipe=begun, step=to_step)
    changed = recipe.model_copy(update={"learning_rate": rate, "parent": parent})
    back = RollbackRecord(from_step=state.step, to_step=to_step, learning_rate=rate, alarms=record.alarms)
    run.update(  # decides; all else follows it
        recipe_hash=changed.hash(),
        parent=parent,
        options=record.options | {"learning_rate": rate, "llama_cpp": record.named_llama_cpp},
        rollbacks=[*record.rollbacks, back],
        alarms=[],
    )
    run.write_recipe(changed)
    checkpoint.discard_stale(run.path, changed.hash(), parent)
    best = f", the best so far (validation loss {state.best_valid_loss:.4f})" if to_step == state.best_step else ""
    where = f"step {to_step}{best}" if to_step else "the start"
    return f"rolled back from step {state.step} to {where}; the learning rate is now {rate:.2g}, half of what it was"


def _target(run: Run, state: State, since: int) -> int:
    """The step of the best adapter, if it is from before the collapse and better than the base; else 0, the start.

    Where nothing was validated yet, that of the newest checkpoint from before.
    """
    if state.best is None or state.best_step is None:
        return checkpoint.step_before(run.path, since) or 0
    return 0 if worse_than_start(state) or state.best_step >= since else state.best_step


def _fresh(adapter: Adapter) -> OptimizerState:
    """The optimizer's averages before a first step."""

    def zeros() -> dict[str, np.ndarray]:
        return {name: np.zeros_like(array) for name, array in adapter.arrays().items()}

    return OptimizerState(0, zeros(), zeros())

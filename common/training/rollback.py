"""Back to the best adapter, at half the learning rate: what `--on-collapse rollback` does to a run."""

import numpy as np

from common.backend import Adapter, OptimizerState
from common.recipe import Parent, Recipe
from common.run_fields import RollbackRecord
from common.run_record import Run
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted
from common.training.validation import worse_than_start

MOST = 3  # rollbacks of a run: an eighth of its learning rate


class RolledBack(Interrupted):
    """The run is ready to be resumed from an earlier step."""


def roll_back(run: Run, recipe: Recipe, state: State) -> str:
    """Have the run resume from its best adapter, or from the start where none was better than the base.

    Its recipe becomes one of half the learning rate, whose parent is the present one. The optimizer's averages begin
    at zero again. Returns what was done, in a line.
    """
    record, rate = run.record, recipe.learning_rate / 2
    to_step = 0 if state.best is None or worse_than_start(state) else state.best_step or 0
    if to_step and state.best is not None:
        kept = State(**vars(state) | {"step": to_step, "evaluated": to_step, "best": None})
        checkpoint.save(run.path, kept, state.best, _fresh(state.best), recipe.hash(), 1)
    else:
        checkpoint.discard_all(run.path)
    parent = Parent(recipe=recipe.hash(), step=to_step) if to_step else None
    changed = recipe.model_copy(update={"learning_rate": rate, "parent": parent})
    back = RollbackRecord(from_step=state.step, to_step=to_step, learning_rate=rate, alarms=record.alarms)
    run.update(  # decides; recipe.yaml follows it
        recipe_hash=changed.hash(),
        parent=parent,
        options=record.options | {"learning_rate": rate},
        rollbacks=[*record.rollbacks, back],
        alarms=[],
    )
    run.write_recipe(changed)
    where = f"step {to_step}, the best so far (validation loss {state.best_valid_loss:.4f})" if to_step else "the start"
    return f"rolled back from step {state.step} to {where}; the learning rate is now {rate:.2g}, half of what it was"


def _fresh(adapter: Adapter) -> OptimizerState:
    def zeros() -> dict[str, np.ndarray]:
        return {name: np.zeros_like(array) for name, array in adapter.arrays().items()}

    return OptimizerState(0, zeros(), zeros())

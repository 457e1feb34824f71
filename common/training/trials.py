"""Trainings of one model on the same rows, one after another, that differ in their hyperparameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.backend import Adapter, Backend
from common.context import Context
from common.data.training_rows import TrainingRows
from common.errors import UserError
from common.models.load import loaded
from common.models.training_base import Base, start_adapter
from common.options import Options
from common.recipe import Plan, Recipe
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from common.training.memory_estimate import TrainingMemory, dims_of
from common.training.observer import Observer
from common.training.planner import choose_plan
from common.training.setup import make_plan, make_recipe


@dataclass
class Trials:
    """A model that stays loaded, and its rows. precision: bf16 or fp32. device: as --device names it.

    Each training gets an adapter of its own over the base. Full fine-tuning changes the base, and loads it again.
    """

    context: Context
    base: Base
    rows: TrainingRows
    backend: str
    device: str
    precision: str
    _loaded: Backend | None = field(default=None, init=False)
    _budget: int = field(default=0, init=False)  # of memory, before the model was loaded
    _start_loss: float | None = field(default=None, init=False)  # before the first step: the same in each

    @property
    def model(self) -> Backend:
        """The backend that trains, with the adapter as it is now. Only while `train` runs, as for its observer."""
        if self._loaded is None:
            raise RuntimeError("no training has begun")
        return self._loaded

    def recipe(self, options: Options) -> Recipe:
        return make_recipe(options, self.base, self.rows, self.precision)

    def train(
        self, options: Options, folder: Path, observer: Observer, began: Callable[[], None] = lambda: None
    ) -> State:
        """The state after a training whose metrics and checkpoints lie in `folder`; it continues from the latest.

        began: called once the model is loaded.
        Raises what `TrainingLoop.train` does.
        """
        recipe, package = self.recipe(options), self.context.backends(self.backend)
        start = start_adapter(recipe, self.base)
        memory = TrainingMemory(package, dims_of(self.base.model), recipe, start)
        train, valid = self.rows.train.rows, self.rows.scored
        base_plan = make_plan(options, self.backend, self.device, self.rows)
        base_plan = base_plan.model_copy(update={"memory_budget": self._budget})
        plan = choose_plan(options, memory, base_plan, train, valid).plan
        self._budget = plan.memory_budget
        folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(folder, recipe.hash(), observer.warn)
        backend = self._ready(recipe, plan, start)
        began()
        state = State.before_training(plan)
        if found:
            found.require_fit(start)
            backend.set_adapter(found.adapter)
            backend.set_optimizer(found.optimizer)
            state = found.state
        elif self._start_loss is not None:
            state.start_valid_loss = self._start_loss
        try:
            state = TrainingLoop(backend, recipe, plan, train, valid, folder, state, observer).train()
        except UserError:
            self.close()  # the next training begins with a model in order
            raise
        self._start_loss = state.start_valid_loss
        return state

    def _ready(self, recipe: Recipe, plan: Plan, start: Adapter | None) -> Backend:
        """The backend as before the first step."""
        if self._loaded is not None and start is not None:
            self._loaded.exchange(recipe, plan, start)
            return self._loaded
        self.close()
        with self.context.display.stage("load the model"):
            self._loaded, _ = loaded(self.context, recipe, plan, self.base.training_base, start)
        return self._loaded

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

"""Trainings of one model on the same rows, one after another, that differ in their hyperparameters."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.backend import Adapter, Backend, OptimizerState
from common.context import Context
from common.data.training_rows import TrainingRows
from common.models.load import loaded
from common.models.training_base import Base, start_adapter
from common.options import Options
from common.recipe import Plan, Recipe
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from common.training.memory_estimate import TrainingMemory, model_dims
from common.training.observer import Observer
from common.training.planner import choose_plan
from common.training.setup import make_plan, make_recipe

# What the loop alone needs: a loaded backend trains with any of them.
_OF_THE_LOOP = {"batch_size", "learning_rate", "schedule", "steps", "warmup_steps", "eval_every", "eval_rows", "parent"}


@dataclass
class Trials:
    """A model that stays loaded, and its rows. precision: bf16 or fp32. device: as --device names it."""

    context: Context
    base: Base
    rows: TrainingRows
    backend: str
    device: str
    precision: str
    _loaded: tuple[dict[str, Any], Backend, Adapter, OptimizerState] | None = field(default=None, init=False)

    @property
    def model(self) -> Backend:
        """The backend that trains, with the adapter as it is now. Only while `train` runs, as for its observer."""
        if self._loaded is None:
            raise RuntimeError("no training has begun")
        return self._loaded[1]

    def recipe(self, options: Options) -> Recipe:
        return make_recipe(options, self.base, self.rows, self.precision)

    def train(self, options: Options, folder: Path, observer: Observer) -> State:
        """The state after a training from the start, whose metrics and checkpoints lie in `folder`.

        Raises what `TrainingLoop.train` does.
        """
        recipe, package = self.recipe(options), self.context.backends(self.backend)
        start = start_adapter(recipe, self.base)
        config = self.base.model.config | {"dtype": self.base.model.dtype}
        memory = TrainingMemory(package, model_dims(config), recipe, start)
        train, valid = self.rows.train.rows, self.rows.scored
        plan = choose_plan(options, memory, make_plan(options, self.backend, self.device, self.rows), train, valid).plan
        backend = self._ready(recipe, plan, start)
        folder.mkdir(parents=True, exist_ok=True)
        state = State.before_training(plan)
        return TrainingLoop(backend, recipe, plan, train, valid, folder, state, observer).train()

    def _ready(self, recipe: Recipe, plan: Plan, start: Adapter | None) -> Backend:
        """The backend as before the first step; the model is loaded where the recipe needs another adapter."""
        key = recipe.model_dump(exclude=_OF_THE_LOOP)
        if self._loaded is None or self._loaded[0] != key:
            self.close()
            backend, _ = loaded(self.context, recipe, plan, self.base.training_base, start)
            self._loaded = key, backend, backend.get_adapter(), backend.get_optimizer()
            return backend
        _, backend, adapter, optimizer = self._loaded
        backend.apply_plan(plan)
        backend.set_adapter(adapter)
        backend.set_optimizer(optimizer)
        return backend

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded[1].close()
            self._loaded = None

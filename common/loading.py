"""A run's model: its base folder, checked, and a backend with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import models
from common.config import Plan, Recipe
from common.dispatch import choose_backend, choose_device, installed
from common.errors import UserError
from common.progress import Display
from common.seam import Adapter, Backend, ModelInfo, OutOfMemory

TEMPLATE = "chat_template.jinja"  # in a run folder: how the model is served


def base_of(run: Path, known: dict[str, Any], display: Display) -> Path:
    """The folder of the model that a run started from. Raises UserError where it is not there, or another one now."""
    model = known["options"]["model"] or ""
    folder = models.resolve(model, display.say)
    if models.content_hash(folder) != known["model_hash"]:
        raise UserError(f"{model} is not the model that {run} was trained on.", "Bring that model back.")
    return folder


def runnable(plan: Plan, recipe: Recipe) -> Plan:
    """The run's plan on this machine: another backend where its own is not here and its base is not quantised.

    Raises UserError where none can compute it.
    """
    movable = recipe.quantization == "none" and not installed("torch" if plan.backend == "torch" else "mlx_lm")
    name = choose_backend("auto" if movable else plan.backend).value
    changes = {"backend": name, "device": choose_device("auto", name).value, "memory_budget": 0}
    return plan.model_copy(update=changes)


def loaded(
    make_backend: Callable[[str], Backend], recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None
) -> tuple[Backend, ModelInfo]:
    backend = make_backend(plan.backend)
    try:
        return backend, backend.load(recipe, plan, folder, adapter)
    except OutOfMemory as error:
        raise UserError(
            f"{recipe.model} does not fit into memory on {plan.device}: {error}",
            "Close other programs, train a smaller model, or hold the base in fewer bits with --quantization 4bit.",
        ) from None

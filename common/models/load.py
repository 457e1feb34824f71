"""The base model of a run, checked, and a backend that has loaded it."""

from pathlib import Path

from common.backend import Adapter, Backend, ModelInfo, OutOfMemory
from common.backend_package import Backends
from common.context import Context
from common.display import Display
from common.errors import PROGRAM, Unable, UserError
from common.models.adapter_files import read_trained
from common.models.lora_init import validate
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.recipe import Plan, Recipe
from common.run_fields import RunRecord
from common.run_record import Run
from common.system.hardware import choose_backend


def base_of(run: Run, display: Display) -> ModelFolder:
    """The model that a run was trained on. Raises UserError where it is missing, or has changed."""
    record = run.record
    model = record.options.get("model") or ""
    if Path(model).is_absolute() and not Path(model).exists():
        raise UserError(
            f"{run} was trained on {model}, which is not there.",
            "Restore it, or put a link there to where it is now. To make all exports again and keep the new place: "
            f"{PROGRAM} fuse {run} --model PATH",
        )
    base = resolve(model, display.say, tried=True)
    if base.content_hash() != record.model_hash:
        raise UserError(f"{model} is not the model that {run} was trained on.", "Restore that model.")
    return base


def adapter_of(run: Run, base: ModelFolder) -> Adapter:
    """What a run has trained. Raises UserError where it is damaged, or does not fit the base model."""
    shapes = linear_shapes(base, run.recipe.targets)
    adapter = read_trained(run.path, base.config["num_hidden_layers"])
    validate(adapter, shapes, run.adapter)
    return adapter


def runnable(plan: Plan, recipe: Recipe, backends: Backends) -> Plan:
    """The run's plan on this machine: on another backend where its own is not installed and its base not quantized.

    Raises UserError where no backend can compute it.
    """
    movable = recipe.quantization == "none" and backends(plan.backend).fault() is not None
    name = choose_backend("auto" if movable else plan.backend, backends).value
    device = backends(name).choose_device("auto").value
    return plan.model_copy(update={"backend": name, "memory_budget": 0, "sharded": False}).on(device)


def loaded(
    context: Context, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None
) -> tuple[Backend, ModelInfo]:
    backend = context.backends(plan.backend).create()
    try:
        info = backend.load(recipe, plan, folder, adapter)
    except OutOfMemory as error:
        raise Unable(
            f"{recipe.model} does not fit into memory on {plan.device_name}: {error}",
            "Close other programs, train a smaller model, or hold the base in fewer bits with --quantization 4bit.",
        ) from None
    if info.warning:
        context.display.warn(info.warning)
    return backend, info


def say_llama(record: RunRecord, given: str | None, display: Display) -> None:
    """Say so where a run was made with a llama.cpp of its own and none is given now."""
    if (named := record.named_llama_cpp) and given is None:
        display.say(
            f"The run was made with --llama-cpp {named!r}. A program is never taken from a run's record: to use that "
            "one again, give the option again."
        )

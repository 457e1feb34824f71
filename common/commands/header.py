"""What `train` shows before its first step."""

from common.backend import Adapter, ModelInfo
from common.commands.prepare import Job
from common.data.batching import steps_per_epoch
from common.display import Display, gigabytes
from common.paths import shown_path
from common.recipe import Recipe
from common.training.planner import described


def show_header(job: Job, info: ModelInfo, display: Display) -> None:
    recipe, plan = job.recipe, job.plan
    hardware = job.hardware
    epochs = recipe.steps / steps_per_epoch(len(job.train), recipe.batch_size)
    display.panel(
        "Twintune",
        {
            "model": f"{recipe.model} ({info.architecture}, {info.layers} layers)",
            "backend": f"{plan.backend}: {hardware.backend.why}",
            "device": f"{plan.device_name}: {hardware.device.why}"
            + (f"; {plan.ranks} devices train together" if plan.ranks > 1 else ""),
            "precision": f"{recipe.precision}: {hardware.precision.why}",
            "data": f"{shown_path(recipe.data)}: {len(job.train)} train, {len(job.valid)} valid rows",
            "recipe": f"{recipe.hash()[:12]}: {recipe.steps} steps of {recipe.batch_size} rows ({epochs:.2f} epochs), "
            f"learning rate {recipe.learning_rate:g} {recipe.schedule}, {recipe.warmup_steps} warm-up steps"
            + (f"; it continues {recipe.parent}" if recipe.parent else ""),
            "method": f"{_method(recipe, job.start)}: "
            f"{info.trainable:,} of {info.total:,} parameters are trained ({info.trainable / info.total:.2%})",
            "plan": described(plan),
            "memory": f"about {gigabytes(job.chosen.prediction.peak)} will be taken of {gigabytes(plan.memory_budget)} "
            f"({job.chosen.why})"
            + ("" if job.chosen.prediction.measured else "; on this device not yet measured")
            + (f"; {job.memory.learned}" if job.memory.learned.observations else ""),
            "run": str(job.run),
        },
    )


def _method(recipe: Recipe, start: Adapter | None) -> str:
    if start is None:
        return "full fine-tuning"
    ranks = sorted({weight.rank for weight in start.weights.values()})
    alphas = sorted({weight.alpha for weight in start.weights.values()})
    return (
        f"{'DoRA' if recipe.method == 'dora' else 'LoRA'}, rank {', '.join(map(str, ranks))}, "
        f"alpha {', '.join(f'{a:g}' for a in alphas)}{' / sqrt(rank)' if recipe.rslora else ''} on "
        f"{len(start.weights)} layers"
        + (f" of a {recipe.quantization} base" if recipe.quantization != "none" else "")
        + (", continuing from a given adapter" if recipe.adapter_hash else "")
    )

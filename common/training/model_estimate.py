"""The plan and the memory of a training whose model is known by its config alone: nothing of it need be here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.backend import Adapter, LoraWeight
from common.backend_package import BackendPackage
from common.data.encode import Encoded
from common.data.encoded_rows import EncodedRows
from common.models.families import text_config
from common.models.lora_init import Shapes, choose_layers, ranks_and_alphas
from common.models.mlx_quantized import scheme
from common.models.shapes import adaptable_shapes
from common.option_fields import RecipeFields
from common.options import Options
from common.recipe import Plan, Recipe
from common.training.auto_recipe import chosen_values
from common.training.memory_estimate import TrainingMemory, model_dims
from common.training.planner import ChosenPlan, choose_plan
from common.training.setup import length


@dataclass(frozen=True)
class Place:
    """Where and how a training would be computed. memory: bytes that it may take; 0: most of what is free."""

    package: BackendPackage
    backend: str
    device: str
    precision: str
    scheme: str  # of a quantized base, such as mlx-4bit-64, or none
    memory: int = 0


def estimated_plan(
    options: Options, config: dict[str, Any], sizes: Sequence[tuple[int, int]], place: Place
) -> ChosenPlan:
    """The plan that `train` would choose, and its memory, by what --recipe auto chooses.

    config: of a supported language model, stored in its `dtype`, or in bf16 where it names none.
    sizes: `(tokens, label tokens)` of each row.
    """
    text = {"dtype": "bfloat16"} | text_config(config)
    held_out = round(options.valid_share * len(sizes))
    train, valid = _rows(sizes[held_out:]), _rows(sizes[:held_out])
    shapes = adaptable_shapes(text, options.targets)
    options, _ = chosen_values(options, text, sum(map(sum, shapes.values())), train)
    recipe = _recipe(options, len(train), place)
    adapter = _adapter(choose_layers(shapes, options.layers, text["num_hidden_layers"]), recipe)
    plan = Plan(
        backend=place.backend,  # type: ignore[arg-type]  # pydantic checks it
        device="cpu",  # `on` replaces it
        micro_batch_tokens=1,
        save_every=1,
        memory_budget=place.memory,
    ).on(place.device)
    dims = replace(model_dims(text), quantized=scheme(config) is not None)
    return choose_plan(options, TrainingMemory(place.package, dims, recipe, adapter), plan, train, valid)


def _adapter(shapes: Shapes, recipe: Recipe) -> Adapter:
    """One of the sizes that training has; its values are of no influence."""
    weights = {
        name: LoraWeight(
            np.zeros((rank, shapes[name][1]), np.float32), np.zeros((shapes[name][0], rank), np.float32), alpha
        )
        for name, (rank, alpha) in ranks_and_alphas(recipe, sorted(shapes)).items()
    }
    return Adapter("", 0, recipe.dropout, weights)


def _rows(sizes: Sequence[tuple[int, int]]) -> EncodedRows:
    """Rows of such sizes; their ids are of no influence."""
    return EncodedRows.of(
        [Encoded(np.zeros(tokens, np.int32), np.arange(tokens) >= tokens - labels, "") for tokens, labels in sizes]
    )


def _recipe(options: Options, rows: int, place: Place) -> Recipe:
    """As `make_recipe` makes it, without the hashes: nothing that is trained has this one."""
    steps, warmup_steps = length(options, rows)
    return Recipe(
        **{name: getattr(options, name) for name in RecipeFields.model_fields},
        model="",
        data="",
        model_hash="",
        data_hash="",
        template_hash="",
        precision=place.precision,  # type: ignore[arg-type]  # pydantic checks it
        quantization=place.scheme,
        steps=steps,
        warmup_steps=warmup_steps,
        eval_every=1,
    )

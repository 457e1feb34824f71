"""mlx-lm's LoRA and DoRA layers on a model, each with the rank and scale of its own weight."""

from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from common.backend import Adapter
from common.models.families import text_name
from mlx_backend.weights import PARTS, to_mlx


def attach(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Attach `adapter` to the frozen `model`. Returns its layers by Hugging Face module name."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    modules = dict(model.named_modules())
    layers = {}
    for name, weight in sorted(adapter.weights.items()):
        kind = LoRALinear if weight.magnitude is None and not adapter.dora else DoRALinear
        linear = modules[text_name(name)]
        layers[name] = kind.from_base(linear, r=weight.rank, dropout=adapter.dropout, scale=weight.scale)
    put(model, layers)
    set_weights(layers, adapter)
    return layers


def paths(adapter: Adapter) -> dict[str, str]:
    """The canonical names of the trained arrays -> their paths in the model."""
    parts = [part for part in PARTS if part != "magnitude" or adapter.dora]
    return {f"{name}.{part}": f"{text_name(name)}.{PARTS[part]}" for name in adapter.weights for part in parts}


def put(model: nn.Module, modules: dict[str, Any]) -> None:
    """Replace modules of the model, given by their Hugging Face names."""
    model.update_modules(tree_unflatten([(text_name(name), module) for name, module in modules.items()]))


def set_weights(layers: dict[str, Any], adapter: Adapter) -> None:
    for name, weight in adapter.weights.items():
        for part, array in weight.parts().items():
            setattr(layers[name], PARTS[part], to_mlx(part, array))

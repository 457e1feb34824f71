"""mlx-lm's LoRA and DoRA layers on a model, each with the rank and scale of its own weight."""

from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten

from common.seam import Adapter
from mlx_backend.weights import PARTS, to_mlx


def attach(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Put `adapter` on the frozen `model`. Returns its layers by Hugging Face module name."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    modules = dict(model.named_modules())
    layers = {}
    for name, weight in sorted(adapter.weights.items()):
        kind = LoRALinear if weight.magnitude is None and not adapter.dora else DoRALinear
        layers[name] = kind.from_base(modules[name], r=weight.rank, dropout=adapter.dropout, scale=weight.scale)
    put(model, layers)
    set_weights(layers, adapter)
    return layers


def put(model: nn.Module, modules: dict[str, Any]) -> None:
    model.update_modules(tree_unflatten(list(modules.items())))


def set_weights(layers: dict[str, Any], adapter: Adapter) -> None:
    for name, weight in adapter.weights.items():
        for part, array in weight.parts().items():
            setattr(layers[name], PARTS[part], to_mlx(part, array))

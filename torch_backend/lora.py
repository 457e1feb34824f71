"""PEFT's LoRA and DoRA layers on a model, each with the rank and alpha of its own weight."""

from typing import Any

import torch

from common.backend import Adapter
from common.models.families import text_name
from torch_backend.shards import assign


def attach(model: Any, adapter: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """`(PEFT's model, trained parameters by canonical name)`: `<module>.lora_A`, `.lora_B`, `.magnitude`."""
    from peft import LoraConfig, get_peft_model

    rank, alpha = adapter.rank_and_alpha
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is right
        rank_pattern={text_name(name): w.rank for name, w in adapter.weights.items() if w.rank != rank},
        alpha_pattern={text_name(name): w.alpha for name, w in adapter.weights.items() if w.alpha != alpha},  # type: ignore[misc]
        use_rslora=next(iter(adapter.weights.values())).rslora,
        use_dora=adapter.dora,
        lora_dropout=adapter.dropout,
        target_modules=[text_name(name) for name in adapter.weights],
    )
    peft = get_peft_model(model, config)
    modules = dict(model.named_modules())
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, weight in sorted(adapter.weights.items()):
        layer = modules[text_name(name)]
        if layer.scaling["default"] != weight.scale:  # PEFT reads patterns as regular expressions
            raise AssertionError(f"PEFT gave {name} the scale {layer.scaling['default']}, not {weight.scale}")
        parameters[f"{name}.lora_A"] = layer.lora_A["default"].weight
        parameters[f"{name}.lora_B"] = layer.lora_B["default"].weight
        if adapter.dora:
            parameters[f"{name}.magnitude"] = layer.lora_magnitude_vector["default"].weight
    set_arrays(parameters, adapter)
    return peft, parameters


def set_arrays(parameters: dict[str, torch.nn.Parameter], adapter: Adapter) -> None:
    for name, array in adapter.arrays().items():
        assign(parameters[name], torch.from_numpy(array))

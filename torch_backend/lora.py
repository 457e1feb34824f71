"""PEFT's LoRA and DoRA layers on a model, each with the rank and alpha of its own weight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from common.backend import Adapter
from common.models.families import text_name
from torch_backend.shards import assign


def attach(model: Any, adapter: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """`(PEFT's model, trained parameters by canonical name)`: `<module>.lora_A`, `.lora_B`, `.magnitude`."""
    from peft import LoraConfig, get_peft_model

    rank, alpha = adapter.rank_and_alpha
    modules = dict(model.named_modules())
    paths = {name: _path(modules, name) for name in adapter.weights}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is right
        rank_pattern={paths[name]: w.rank for name, w in adapter.weights.items() if w.rank != rank},
        alpha_pattern={paths[name]: w.alpha for name, w in adapter.weights.items() if w.alpha != alpha},  # type: ignore[misc]
        use_rslora=next(iter(adapter.weights.values())).rslora,
        use_dora=adapter.dora,
        lora_dropout=adapter.dropout,
        target_modules=[*paths.values()],
    )
    with _unnamed(model):
        peft = get_peft_model(model, config)
    modules = dict(model.named_modules())
    parameters: dict[str, torch.nn.Parameter] = {}
    for name, weight in sorted(adapter.weights.items()):
        layer = modules[paths[name]]
        if layer.scaling["default"] != weight.scale:  # PEFT reads patterns as regular expressions
            raise AssertionError(f"PEFT gave {name} the scale {layer.scaling['default']}, not {weight.scale}")
        parameters[f"{name}.lora_A"] = layer.lora_A["default"].weight
        parameters[f"{name}.lora_B"] = layer.lora_B["default"].weight
        if adapter.dora:
            parameters[f"{name}.magnitude"] = layer.lora_magnitude_vector["default"].weight
    set_arrays(parameters, adapter)
    return peft, parameters


def _path(modules: Mapping[str, Any], name: str) -> str:
    """Where the model has the module of this Hugging Face name; transformers renames what comes before the layers."""
    if (path := text_name(name)) in modules:
        return path
    own = name.split("layers.", 1)[1]
    return next(path for path in modules if path.endswith(f"layers.{own}"))


@contextmanager
def _unnamed(model: Any) -> Iterator[None]:
    """By the model's type PEFT takes targets in mixtures of experts for others, though each is a linear layer here."""
    kind, model.config.model_type = model.config.model_type, ""
    try:
        yield
    finally:
        model.config.model_type = kind


def set_arrays(parameters: dict[str, torch.nn.Parameter], adapter: Adapter) -> None:
    for name, array in adapter.arrays().items():
        assign(parameters[name], torch.from_numpy(array))

"""PEFT's LoRA and DoRA layers on a model, each with the rank and alpha of its own weight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from common.backend import Adapter
from common.models.experts import stack_of
from common.models.families import text_name
from torch_backend.linear import frozen_weight
from torch_backend.shards import assign


def attach(model: Any, adapter: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """`(PEFT's model, trained parameters by canonical name)`: `<module>.lora_A`, `.lora_B`, `.magnitude`."""
    from peft import LoraConfig, get_peft_model

    from torch_backend.experts import LoraExperts

    rank, alpha = adapter.rank_and_alpha
    modules = dict(model.named_modules())
    experts = {stack_of(name).rpartition(".")[0] for name in adapter.weights if stack_of(name) != name}
    linear = {name: weight for name, weight in adapter.weights.items() if stack_of(name) == name}
    paths = {name: _path(modules, name) for name in [*linear, *experts]}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is right
        rank_pattern={paths[name]: w.rank for name, w in linear.items() if w.rank != rank},
        alpha_pattern={paths[name]: w.alpha for name, w in linear.items() if w.alpha != alpha},  # type: ignore[misc]
        use_rslora=next(iter(adapter.weights.values())).rslora,
        use_dora=adapter.dora,
        lora_dropout=adapter.dropout,
        target_modules=[*paths.values()],
    )
    names = {path: name for name, path in paths.items()}

    def lora_experts(base: Any, adapter_name: str, target_name: str, **_: Any) -> LoraExperts:
        return LoraExperts(base, adapter_name, names[target_name], adapter.weights, adapter.dropout)

    config._register_custom_module({type(modules[paths[name]]): lora_experts for name in experts})
    with _unnamed(model):
        peft = get_peft_model(model, config)
    modules = dict(model.named_modules())
    parameters: dict[str, torch.nn.Parameter] = {}
    for name in sorted(experts):
        parameters |= modules[paths[name]].parameters_of(name)
    for name, weight in sorted(linear.items()):
        layer = modules[paths[name]]
        if layer.scaling["default"] != weight.scale:  # PEFT reads patterns as regular expressions
            raise AssertionError(f"PEFT gave {name} the scale {layer.scaling['default']}, not {weight.scale}")
        parameters[f"{name}.lora_A"] = layer.lora_A["default"].weight
        parameters[f"{name}.lora_B"] = layer.lora_B["default"].weight
        if adapter.dora:
            vector = layer.lora_magnitude_vector["default"].weight
            vector.data = frozen_weight(layer.base_layer).float().norm(dim=1)  # PEFT rounds to the matrix's type
            parameters[f"{name}.magnitude"] = vector
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

"""The hand-written layers in place of those of transformers and PEFT; `tests/torch/test_layers.py` compares the two."""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch

from common.backend import Adapter
from torch_backend.linear import FrozenLinear, LoraGroup, frozen_weight
from torch_backend.mlp import Gated, GatedDown
from torch_backend.norm import Norm, RMSNorm
from torch_backend.rope import calling_rope

_ONE_INPUT = (  # layers that read the same
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
# Of an MLP in any family: gate and up, which may be one, then down. The last are those of Granite 4 and of LFM2.
_MLP_NAMES = (
    *("gate_proj", "up_proj", "gate_up_proj", "input_linear", "w1", "w3"),
    *("down_proj", "output_linear", "w2"),
)


def install(model: Any, adapter: Adapter) -> list[LoraGroup]:
    """Replace the forward functions of `model`, a frozen one with PEFT's layers, by those of this package.

    Returns the LoRA layers that it computes. Raises AssertionError where a class has another name than is known here:
    its layers would silently stay slow.
    """
    decoders = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    attentions = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    nets = [module for module in model.modules() if type(module).__name__.endswith(("GatedDeltaNet", "ShortConv"))]
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    layers = model.config.num_hidden_layers
    if not (len(decoders) == len(attentions) + len(nets) == layers and len(norms) > 2 * layers):
        raise AssertionError(
            f"{type(model).__name__} has {layers} layers, of which {len(decoders)} decoder layers, {len(attentions)} "
            f"attentions, {len(nets)} others in their place and {len(norms)} norms were recognized: this transformers "
            "is not known here"
        )
    for norm in norms:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        norm.forward = partial(_norm, norm, eps, norm_kind(type(norm).__name__))
    for net in nets:
        if hasattr(net, "norm"):
            net.norm.forward = partial(_gated_norm, net.norm)
    for decoder in decoders:
        last = not any(hasattr(decoder, f"post_{name}_layernorm") for name in ("feedforward", "mlp"))
        mlp = mlp_of(decoder)
        mlp.forward = partial(_mlp, mlp, type(decoder).__name__.startswith("Gemma"), last)
    for attention in attentions:
        attention.forward = MethodType(calling_rope(type(attention).forward), attention)
    return _install_linear(model, adapter)


def _install_linear(model: Any, adapter: Adapter) -> list[LoraGroup]:
    """PEFT's layers, and the frozen linear layers."""
    groups, grouped = list[LoraGroup](), set[Any]()
    for parent in model.modules():
        children = [child for _, child in parent.named_children() if _is_plain(child)]
        for members in _of_one_input(parent, children):
            groups.append(LoraGroup(members))
            grouped.update(members)
            for number, member in enumerate(members):
                member.forward = partial(_lora, member, groups[-1], number)
            if len(members) > 1 and type(parent).__name__.endswith("Attention"):
                parent.forward = partial(_forgetting, parent.forward, groups[-1])
        if type(parent) is torch.nn.Linear and not parent.weight.requires_grad:
            parent.forward = partial(_frozen, parent)
    quantized = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    if not quantized and len(grouped) != len(adapter.weights):
        raise AssertionError(
            f"{len(grouped)} of {len(adapter.weights)} LoRA layers were recognized: PEFT is another one"
        )
    return groups


def _is_plain(module: Any) -> bool:
    return hasattr(module, "lora_A") and type(module.base_layer).__name__ in ("Linear", "Linear4bit")


def _of_one_input(parent: Any, children: list[Any]) -> list[list[Any]]:
    """The children in groups that read the same input at one scale."""
    together = {getattr(parent, name, None): names for names in _ONE_INPUT for name in names}
    groups = dict[Any, list[Any]]()
    for child in children:
        groups.setdefault((together.get(child, child), child.scaling["default"]), []).append(child)
    return [*groups.values()]


def norm_kind(name: str) -> Norm:
    """Of the class of this name in transformers."""
    if name.startswith(("Gemma4", "Olmo")):
        return "late"
    return "centered" if name.startswith(("Gemma", "Qwen3_5")) else "plain"


def _norm(module: Any, eps: float, kind: Norm, x: torch.Tensor) -> torch.Tensor:
    # Gemma 4's values are normed by no weight
    weight = module.weight if hasattr(module, "weight") else torch.ones(x.shape[-1], device=x.device)
    return RMSNorm.apply(x, weight, eps, kind)


def _gated_norm(module: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return Gated.apply(gate, RMSNorm.apply(x, module.weight, module.variance_epsilon, "plain"), False)


def _frozen(module: Any, x: torch.Tensor) -> torch.Tensor:
    return FrozenLinear.apply(x, module.weight, module.bias)


def mlp_of(decoder: Any) -> Any:
    """A layer's MLP, by its name in any family."""
    return next(getattr(decoder, name) for name in ("mlp", "shared_mlp", "feed_forward") if hasattr(decoder, name))


def mlp_inputs(module: Any) -> tuple[list[Any], Any]:
    """`([gate and up, which may be one], down)` of an MLP; of a mixture of experts none, and None."""
    *inputs, down = [None, *(getattr(module, name) for name in _MLP_NAMES if hasattr(module, name))]
    return inputs[1:], down


def _mlp(module: Any, gelu: bool, last: bool, x: torch.Tensor) -> torch.Tensor:
    inputs, down = mlp_inputs(module)
    gate, up = inputs[0](x).chunk(2, dim=-1) if len(inputs) == 1 else (inputs[0](x), inputs[1](x))
    if getattr(down.forward, "func", None) is not _lora or down.disable_adapters:
        return down(Gated.apply(gate, up, gelu))
    group = down.forward.args[1]
    return GatedDown.apply(gate, up, gelu, last, group, *group.trained)


def _lora(module: Any, group: LoraGroup, number: int, x: torch.Tensor) -> torch.Tensor:
    if module.disable_adapters:
        return FrozenLinear.apply(x, frozen_weight(module.base_layer), module.base_layer.bias)
    return group.output(number, x)


def _forgetting(forward: Callable[..., Any], group: LoraGroup, *given: Any, **named: Any) -> Any:
    """An attention's forward; where it fails, what was computed for its next layers must not stay in memory."""
    try:
        return forward(*given, **named)
    finally:
        group.forget()

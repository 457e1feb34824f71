"""Frozen layers and their LoRA with a backward pass written by hand: fewer passes over memory, and less kept for it.

transformers and PEFT are right but general: they keep what a frozen model never needs again. Installed where every
weight of the base is frozen; `tests/torch/test_fused.py` holds each to what it stands in for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from common.backend import Adapter
from torch_backend.layers import RMSNorm, calling_rope
from torch_backend.matmul import back, forth

_aten = torch.ops.aten


class LoraLinear(torch.autograd.Function):
    """`x @ W.T + bias + scale * (x @ A.T) @ B.T` for the frozen W of `base`; A [r, in] and B [out, r] float32.

    kept for the backward pass: x in its own type, and `x @ A.T`; a W in 4 bits is written out once for each way.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = _low(flat, A)
        ctx.save_for_backward(flat, low, A, B)
        ctx.base, ctx.scale = base, scale
        return _adapted(flat, low, base, B, scale).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        flat, low, A, B = ctx.saved_tensors
        grad_low, grad_A, grad_B = _lora_back(outputs[0], flat, low, B, ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _base_back(outputs[0], grad_low, ctx.base, A, flat.dtype)
            grad_x = grad_x.view(*outputs[0].shape[:-1], -1).to(flat.dtype)
        return grad_x, None, grad_A, grad_B, None


def _kind(x: torch.Tensor) -> torch.dtype:
    """What the adapter's products are computed in: float32; on a GPU that would cost more than the base's do."""
    return x.dtype if x.is_cuda else torch.float32


def _low(flat: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """`x @ A.T`; as all that follow with its long side last: the other way crawls on a CPU."""
    kind = _kind(flat)
    return (A.to(kind) @ flat.to(kind).T).T


def _adapted(flat: torch.Tensor, low: torch.Tensor, base: Any, B: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, out]: the base's product, as it is rounded, and the adapter's."""
    result = forth(flat, frozen_weight(base)).to(low.dtype).addmm_(low, B.T.to(low.dtype), alpha=scale)
    if base.bias is not None:
        result += base.bias
    return result


def _lora_back(
    grad_output: torch.Tensor, flat: torch.Tensor, low: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(gradient by low, by A, by B)`; the latter two float32."""
    exact = grad_output.reshape(-1, grad_output.shape[-1]).to(low.dtype)
    grad_low = (B.T.to(low.dtype) @ exact.T).mul_(scale).T
    return grad_low, _summed(grad_low.T, flat.to(low.dtype)), _summed(low.T, exact).mul_(scale).T


def _summed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in float32, whatever they are in."""
    return left @ right if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)


def _base_back(
    grad_output: torch.Tensor, grad_low: torch.Tensor, base: Any, A: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient by x [N, in]."""
    grad_x = back(grad_output.reshape(-1, grad_output.shape[-1]), frozen_weight(base), dtype).to(grad_low.dtype)
    return grad_x.addmm_(grad_low, A.to(grad_low.dtype))


class FrozenLinear(torch.autograd.Function):
    """`x @ W.T + bias` for frozen W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        result = forth(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return (result if bias is None else result.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = back(outputs[0].flatten(0, -2), weight, outputs[0].dtype).view(*outputs[0].shape[:-1], -1)
        return grad_x.to(outputs[0].dtype), None, None


def frozen_weight(base: Any) -> torch.Tensor:
    """[out, in] of a linear layer, also of one that bitsandbytes holds in 4 bits."""
    if (state := getattr(base.weight, "quant_state", None)) is None:
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state)


class Gated(torch.autograd.Function):
    """`act(gate) * up` with act SiLU or tanh's GELU; kept: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _activation(gate, gelu).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        by_up = _activation(gate, ctx.gelu).mul_(outputs[0])
        return _gate_back(outputs[0] * up, gate, ctx.gelu), by_up, None


class GatedDown(torch.autograd.Function):
    """`LoraLinear` of `act(gate) * up`; the backward pass makes that product again: kept are gate, up and `x @ A.T`."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        gelu: bool,
        base: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        last: bool,
    ) -> torch.Tensor:
        inner = _activation(gate, gelu).mul_(up).flatten(0, -2)
        low = _low(inner, A)
        ctx.save_for_backward(gate, up, low, A, B)
        ctx.gelu, ctx.base, ctx.scale = gelu, base, scale
        if last and _again.get():  # nobody reads it
            return gate.new_zeros(()).expand(*gate.shape[:-1], len(B))
        return _adapted(inner, low, base, B, scale).view(*gate.shape[:-1], -1).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        gate, up, low, A, B = ctx.saved_tensors
        activation = _activation(gate, ctx.gelu)
        inner = (activation * up).flatten(0, -2)
        grad_low, grad_A, grad_B = _lora_back(outputs[0], inner, low, B, ctx.scale)
        del inner
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, None, None, grad_A, grad_B, None, None
        by_inner = _base_back(outputs[0], grad_low, ctx.base, A, gate.dtype).to(gate.dtype).view_as(gate)
        by_up = activation.mul_(by_inner)
        by_gate = _gate_back(by_inner.mul_(up), gate, ctx.gelu)
        return by_gate, by_up, None, None, grad_A, grad_B, None, None


def _gate_back(by_activation: torch.Tensor, gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    if gelu:
        return _aten.gelu_backward(by_activation, gate, approximate="tanh")
    return _aten.silu_backward(by_activation, gate)


_again: ContextVar[bool] = ContextVar("again", default=False)


@contextmanager
def again() -> Iterator[None]:
    """Around what gradient checkpointing computes a second time: a layer's last product is left out."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


def _activation(gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    return functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)


def install(model: Any, adapter: Adapter) -> None:
    """Put the functions above in the place of what `model`, a frozen one with PEFT's layers, computes otherwise."""
    plain = not (adapter.dora or adapter.dropout)
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            module.forward = partial(_norm, module, eps, kind.startswith("Gemma"))
        elif kind.endswith("DecoderLayer"):
            last = not hasattr(module, "post_feedforward_layernorm")
            module.mlp.forward = partial(_mlp, module.mlp, kind.startswith("Gemma"), last)
        elif kind.endswith("Attention"):
            module.forward = MethodType(calling_rope(type(module).forward), module)
        elif plain and _lora_of(module):
            module.forward = partial(_lora, module)
        if type(module) is torch.nn.Linear and not module.weight.requires_grad:
            module.forward = partial(_frozen, module)


def _lora_of(module: Any) -> bool:
    return hasattr(module, "lora_A") and type(module.base_layer).__name__ in ("Linear", "Linear4bit")


def _norm(module: Any, eps: float, gemma: bool, x: torch.Tensor) -> torch.Tensor:
    return RMSNorm.apply(x, module.weight, eps, gemma)


def _frozen(module: Any, x: torch.Tensor) -> torch.Tensor:
    return FrozenLinear.apply(x, module.weight, module.bias)


def _mlp(module: Any, gelu: bool, last: bool, x: torch.Tensor) -> torch.Tensor:
    if hasattr(module, "gate_up_proj"):
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    down = module.down_proj
    if getattr(down.forward, "func", None) is not _lora or down.disable_adapters:
        return down(Gated.apply(gate, up, gelu))
    return GatedDown.apply(gate, up, gelu, down.base_layer, *_trained(down), last)


def _lora(module: Any, x: torch.Tensor) -> torch.Tensor:
    if module.disable_adapters:
        return FrozenLinear.apply(x, frozen_weight(module.base_layer), module.base_layer.bias)
    return LoraLinear.apply(x, module.base_layer, *_trained(module))


def _trained(module: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    return module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]

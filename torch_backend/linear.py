"""Frozen linear layers and their LoRA, with a backward pass written by hand.

transformers and PEFT are right but general: they keep what a frozen model never needs again. These keep less, and read
memory fewer times.
"""

from typing import Any

import torch

from torch_backend.matmul import cpu_computes, linear, linear_grad_input


class LoraLinear(torch.autograd.Function):
    """`x @ W.T + bias + scale * (x @ A.T) @ B.T` for the frozen W of `base`; A [r, in] and B [out, r] float32.

    Kept for the backward pass: x in its own type, and `x @ A.T`; a W in 4 bits is dequantized again.
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
        low = lora_low(flat, A)
        ctx.save_for_backward(flat, low, A, B)
        ctx.base, ctx.scale = base, scale
        return lora_output(flat, low, base, B, scale).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        flat, low, A, B = ctx.saved_tensors
        grad_low, grad_A, grad_B = lora_grads(outputs[0], flat, low, B, ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = lora_grad_input(outputs[0], grad_low, ctx.base, A, flat.dtype)
            grad_x = grad_x.view(*outputs[0].shape[:-1], -1).to(flat.dtype)
        return grad_x, None, grad_A, grad_B, None


def _lora_type(x: torch.Tensor) -> torch.dtype:
    """The type of the adapter's products: float32 on a CPU, unless that multiplies the activations' bf16 itself.

    There, and on a GPU, float32 would take more time than the base's own products.
    """
    return x.dtype if x.is_cuda or cpu_computes(x) else torch.float32


def lora_low(flat: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """`x @ A.T`, computed as `(A @ x.T).T`: with the long side last it is many times faster on a CPU."""
    dtype = _lora_type(flat)
    return (A.to(dtype) @ flat.to(dtype).T).T


def lora_output(flat: torch.Tensor, low: torch.Tensor, base: Any, B: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, out]: the base's product, rounded as the base computes it, plus the adapter's."""
    result = linear(flat, frozen_weight(base)).to(low.dtype).addmm_(low, B.T.to(low.dtype), alpha=scale)
    if base.bias is not None:
        result += base.bias
    return result


def lora_grads(
    grad_output: torch.Tensor, flat: torch.Tensor, low: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(grad_low, grad_A, grad_B)`; the latter two float32."""
    exact = grad_output.reshape(-1, grad_output.shape[-1]).to(low.dtype)
    grad_low = (B.T.to(low.dtype) @ exact.T).mul_(scale).T
    return grad_low, _float32_product(grad_low.T, flat.to(low.dtype)), _float32_product(low.T, exact).mul_(scale).T


def _float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` added up in float32, whatever their type; on a CPU the sum of bf16 products is then rounded."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def lora_grad_input(
    grad_output: torch.Tensor, grad_low: torch.Tensor, base: Any, A: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """grad_x [N, in]. dtype: the activations' type."""
    flat = grad_output.reshape(-1, grad_output.shape[-1])
    return linear_grad_input(flat, frozen_weight(base), dtype).to(grad_low.dtype).addmm_(grad_low, A.to(grad_low.dtype))


class FrozenLinear(torch.autograd.Function):
    """`x @ W.T + bias` for frozen W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        result = linear(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return (result if bias is None else result.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = linear_grad_input(outputs[0].flatten(0, -2), weight, outputs[0].dtype)
        return grad_x.view(*outputs[0].shape[:-1], -1).to(outputs[0].dtype), None, None


def frozen_weight(base: Any) -> torch.Tensor:
    """[out, in] of a linear layer, dequantized where bitsandbytes holds it in 4 bits."""
    if (state := getattr(base.weight, "quant_state", None)) is None:
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state)

"""The gated MLP with a backward pass written by hand, which recomputes products instead of keeping them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional

from torch_backend import fused
from torch_backend.linear import LoraGroup, dora_grads, lora_grad_input, lora_grads, lora_low, lora_outputs, masked

_aten = torch.ops.aten
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


class Gated(torch.autograd.Function):
    """`act(gate) * up` with act SiLU or tanh's GELU; kept for the backward pass: gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _gated(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if triton := fused.kernels(gate):
            return *triton.gated_grads(outputs[0], gate, up, ctx.gelu), None
        grad_up = _activation(gate, ctx.gelu).mul_(outputs[0])
        return _grad_gate(outputs[0] * up, gate, ctx.gelu), grad_up, None


class GatedDown(torch.autograd.Function):
    """`LoraLinear` of `act(gate) * up`, whose product is recomputed in the backward pass.

    Kept for it: gate, up, `scale * drop(x) @ A.T`, dropout's mask, and DoRA's output. last: the layer ends with it;
    without DoRA its output is not needed when recomputing.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, gelu: bool, last: bool, down: LoraGroup, *trained: torch.Tensor
    ) -> torch.Tensor:
        """trained: `down.trained`, whose gradients are wanted."""
        inner = _gated(gate, up, gelu).flatten(0, -2)
        mask = down.draw_mask(inner)
        low = lora_low(masked(inner, mask), down)
        ctx.gelu, ctx.down, ctx.gains = gelu, down, []
        if last and _recomputing.get() and not down.magnitudes:  # nobody reads it
            ctx.save_for_backward(gate, up, low, mask)
            return gate.new_zeros(()).expand(*gate.shape[:-1], len(trained[1]))
        (result,), kept, ctx.gains = lora_outputs(inner, low, down)
        ctx.save_for_backward(gate, up, low, mask, *kept)
        return result.view(*gate.shape[:-1], -1).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[Any, ...]:
        gate, up, low, mask, *kept = ctx.saved_tensors
        grads, magnitudes = dora_grads(given, kept, ctx.gains, ctx.down)
        triton = fused.kernels(gate)
        activation = None if triton else _activation(gate, ctx.gelu)
        inner = (_gated(gate, up, ctx.gelu) if activation is None else activation * up).flatten(0, -2)
        grad_low, *matrices = lora_grads(grads, masked(inner, mask), low, ctx.down)
        trained = (*matrices, *magnitudes)
        del inner
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return None, None, None, None, None, *trained
        grad_inner = lora_grad_input(grads, grad_low, mask, ctx.down, gate.dtype).to(gate.dtype).view_as(gate)
        if activation is None:
            return *triton.gated_grads(grad_inner, gate, up, ctx.gelu), None, None, None, *trained
        grad_up = activation.mul_(grad_inner)
        grad_gate = _grad_gate(grad_inner.mul_(up), gate, ctx.gelu)
        return grad_gate, grad_up, None, None, None, *trained


def _gated(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    if triton := fused.kernels(gate):
        found: torch.Tensor = triton.gated(gate, up, gelu)
        return found
    return _activation(gate, gelu).mul_(up)


def _activation(gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    return functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)


def _grad_gate(grad_activation: torch.Tensor, gate: torch.Tensor, gelu: bool) -> torch.Tensor:
    if gelu:
        return _aten.gelu_backward(grad_activation, gate, approximate="tanh")
    return _aten.silu_backward(grad_activation, gate)


@contextmanager
def recomputing() -> Iterator[None]:
    """Around what gradient checkpointing computes a second time: a layer's last product is left out."""
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)

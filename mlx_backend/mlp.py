"""The gated MLP with a backward pass written by hand, which keeps less than MLX's own."""

import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def feed_forward(self: Any, x: mx.array) -> mx.array:
    """The output [tokens, hidden] of a layer's MLP, in all families. `self` is mlx-lm's module."""
    if joined := self.get("gate_up_proj") or self.get("input_linear"):  # Phi-3, GLM-4; Granite 4
        gate, up = mx.split(joined(x), 2, axis=-1)
    elif "w1" in self:  # LFM2
        gate, up = self.w1(x), self.w3(x)
    else:
        gate, up = self.gate_proj(x), self.up_proj(x)
    down = next(self[name] for name in ("down_proj", "output_linear", "w2") if name in self)
    return down((gated_gelu if self.gelu else gated_silu)(gate, up))


@mx.custom_function
def gated_silu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`; kept for the backward pass: gate and up only."""
    return gate * mx.sigmoid(gate) * up


@gated_silu.vjp
def _gated_silu_vjp(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _silu_grads(gate, up, grad_output)


@partial(mx.compile, shapeless=True)
def _silu_grads(gate: mx.array, up: mx.array, grad_output: mx.array) -> tuple[mx.array, mx.array]:
    """`(grad_gate, grad_up)`"""
    sigmoid = mx.sigmoid(gate)
    grad_up = grad_output * gate * sigmoid
    return grad_output * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_up


@mx.custom_function
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu(gate) * up`, tanh's GELU; kept for the backward pass: gate and up only."""
    return nn.gelu_approx(gate) * up


@gated_gelu.vjp
def _gated_gelu_vjp(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _gelu_grads(gate, up, grad_output)


@partial(mx.compile, shapeless=True)
def _gelu_grads(gate: mx.array, up: mx.array, grad_output: mx.array) -> tuple[mx.array, mx.array]:
    """`(grad_gate, grad_up)`"""
    factor, cube = math.sqrt(2 / math.pi), 0.044715
    square = mx.square(gate)
    tanh = mx.tanh(factor * gate * (1 + cube * square))
    grad_up = grad_output * (0.5 * gate * (1 + tanh))
    derivative = 0.5 * (1 + tanh) + 0.5 * gate * (1 - mx.square(tanh)) * (factor * (1 + 3 * cube * square))
    return grad_output * up * derivative, grad_up

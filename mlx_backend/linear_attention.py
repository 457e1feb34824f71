"""Gated delta nets (Qwen3.5) and short convolutions (LFM2) over packed rows: padding exists inside them only."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_backend.attention import RaggedRows
from mlx_backend.gated_delta import gated_delta
from mlx_backend.mlp import gated_silu

_EPSILON = 1e-6  # of the length of queries and keys


@dataclass
class LinearCache:
    """What a layer keeps of a row while generating."""

    offset: int = 0  # tokens so far
    inputs: mx.array | None = None  # of the convolution: the newest ones [1, K - 1, channels]
    state: mx.array | None = None


def mix(self: Any, x: mx.array, mask: Any, rows: RaggedRows) -> mx.array:
    """The output [tokens, hidden] of a gated delta net for x [tokens, hidden]. `self` is mlx-lm's module.

    A row begins with a state of zeros, and nothing before it; it is padded on the right, where no real token looks.
    """
    cache: LinearCache | None = rows.cache
    projected = self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x)
    mixed, a, b = (rows.pad(part[:, None])[:, 0] for part in projected)
    inputs, taps = _continued(mixed, self.conv1d, cache)
    convolved: Any = _silu_of_convolution(inputs, taps)
    queries, keys, values = mx.split(convolved, [self.key_dim, 2 * self.key_dim], axis=-1)
    queries, keys = (_unit(_heads(part, self.head_k_dim)) for part in (queries, keys))
    decay = -mx.exp(self.A_log.astype(mx.float32)) * nn.softplus(a.astype(mx.float32) + self.dt_bias)
    parts = [
        *(queries * self.head_k_dim**-0.5, keys, _heads(values, self.head_v_dim)),
        *(decay.swapaxes(1, 2), mx.sigmoid(b).swapaxes(1, 2)),
    ]
    outputs, state = gated_delta(parts, cache.state if cache else None)
    if cache is not None:
        cache.state, cache.offset = state, cache.offset + len(x)
    outputs = rows.unpad(outputs.astype(x.dtype)).reshape(-1, self.head_v_dim)
    normed = mx.fast.rms_norm(outputs, self.norm.weight, self.norm.eps)
    gated: Any = gated_silu(self.in_proj_z(x).reshape(-1, self.head_v_dim), normed)
    return self.out_proj(gated.reshape(len(x), -1))


def _heads(x: mx.array, width: int) -> mx.array:
    """[B, T, heads * width] -> [B, heads, T, width]."""
    return x.reshape(*x.shape[:2], -1, width).swapaxes(1, 2)


def _unit(x: mx.array) -> mx.array:
    """Each vector divided by its length."""
    return mx.fast.rms_norm(x, None, _EPSILON / x.shape[-1]) * x.shape[-1] ** -0.5


def convolve(self: Any, x: mx.array, mask: Any, rows: RaggedRows) -> mx.array:
    """The output [tokens, hidden] of a gated short convolution for x [tokens, hidden]; see `mix`."""
    cache: LinearCache | None = rows.cache
    before, after, part = mx.split(self.in_proj(x), 3, axis=-1)
    inputs, taps = _continued(rows.pad((before * part)[:, None])[:, 0], self.conv, cache)
    if cache is not None:
        cache.offset += len(x)
    convolved = rows.unpad(_convolution(inputs, taps)[:, None])
    if "bias" in self.conv:
        convolved = convolved + self.conv.bias
    return self.out_proj(after * convolved)


def _continued(x: mx.array, convolution: Any, cache: LinearCache | None) -> tuple[mx.array, mx.array]:
    """x [B, T, channels] behind what a causal convolution sees before it, and the taps [K, channels].

    convolution: its weight is [channels, 1, K], as in torch.
    """
    taps = convolution.weight[:, 0].T
    before = None if cache is None else cache.inputs
    if before is None:
        before = mx.zeros((len(x), len(taps) - 1, x.shape[-1]), x.dtype)
    inputs = mx.concatenate([before, x], axis=1)
    if cache is not None:
        cache.inputs = inputs[:, x.shape[1] :]
    return inputs, taps


@mx.custom_function
def _silu_of_convolution(inputs: mx.array, taps: mx.array) -> mx.array:
    """inputs [B, K - 1 + T, channels], taps [K, channels] -> [B, T, channels]. Kept for the backward pass: these."""
    return nn.silu(_convolution(inputs, taps))


def _convolution(inputs: mx.array, taps: mx.array) -> mx.array:
    length = inputs.shape[1] - len(taps) + 1
    return sum((inputs[:, i : i + length] * taps[i] for i in range(1, len(taps))), inputs[:, :length] * taps[0])


@_silu_of_convolution.vjp
def _silu_of_convolution_vjp(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    inputs, taps = primals
    return _convolution_grads(inputs, taps, grad_output)


@mx.compile
def _convolution_grads(inputs: mx.array, taps: mx.array, grad_output: mx.array) -> tuple[mx.array, mx.array]:
    convolved, reach = _convolution(inputs, taps), len(taps) - 1
    sigmoid = mx.sigmoid(convolved)
    grad = grad_output * sigmoid * (1 + convolved * (1 - sigmoid))
    length = grad.shape[1]
    of_taps = [(grad * inputs[:, i : i + length]).sum((0, 1)) for i in range(len(taps))]
    padded = mx.pad(grad, [(0, 0), (reach, reach), (0, 0)])
    return _convolution(padded, taps[::-1]), mx.stack(of_taps)

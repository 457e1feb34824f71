"""mlx-lm's layers, with attention over rows of unequal length that lie end to end, and a leaner backward pass.

Padding exists inside attention only, nowhere else.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch, end to end, stand among its padded positions [B, T]."""

    count: int
    width: int
    places: mx.array | None  # [tokens] int32; None: all rows are as long, nothing is padded
    cache: Any = None  # mlx-lm's KVCache of this layer, where one row grows: these are its newest tokens

    def spread(self, x: mx.array) -> mx.array:
        """[tokens, heads, d] -> [B, heads, T, d], zeros where a row has ended."""
        if self.places is not None:
            padded = mx.zeros((self.count * self.width, *x.shape[1:]), x.dtype)
            padded[self.places] = x
            x = padded
        return x.reshape(self.count, self.width, *x.shape[1:]).transpose(0, 2, 1, 3)

    def gather(self, x: mx.array) -> mx.array:
        """[B, heads, T, d] -> [tokens, heads * d]."""
        flat = x.transpose(0, 2, 1, 3).reshape(self.count * self.width, -1)
        return flat if self.places is None else flat[self.places]


def attend(self: Any, x: mx.array, mask: Any, rows: Rows) -> mx.array:
    """A layer's attention, for all families: x [tokens, hidden]. `self` is mlx-lm's module, whose own call pads all.

    Rows are right-padded, so no real token sees padding.
    """
    if "qkv_proj" in self:  # Phi-3
        whole, part = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        queries, keys, values = mx.split(self.qkv_proj(x), [whole, whole + part], axis=-1)
    else:
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    queries = queries.reshape(len(x), self.n_heads, -1)
    keys, values = (part.reshape(len(x), self.n_kv_heads, -1) for part in (keys, values))
    if "q_norm" in self:
        queries, keys = self.q_norm(queries), self.k_norm(keys)
    queries, keys, values = rows.spread(queries), rows.spread(keys), rows.spread(values)
    before = 0 if rows.cache is None else rows.cache.offset
    queries, keys = self.rope(queries, before), self.rope(keys, before)
    if rows.cache is not None:
        keys, values = rows.cache.update_and_fetch(keys, values)
    if (cap := getattr(self, "attn_logit_softcapping", None)) is None:
        result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
    else:  # Gemma 2: MLX has no kernel that caps the scores
        shape = queries.shape
        queries = queries.reshape(shape[0], self.n_kv_heads, -1, *shape[2:])
        scores = mx.tanh((queries @ keys[:, :, None].swapaxes(-1, -2)) * (self.scale / cap)) * cap
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        result = (mx.softmax(scores, precise=True, axis=-1) @ values[:, :, None]).reshape(shape)
    return self.o_proj(rows.gather(result))


@mx.custom_function
def gated_silu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up`; kept for the backward pass: these two only."""
    return gate * mx.sigmoid(gate) * up


@gated_silu.vjp
def _gated_silu_back(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _silu_back(gate, up, grad_output)


@partial(mx.compile, shapeless=True)
def _silu_back(gate: mx.array, up: mx.array, grad_output: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = mx.sigmoid(gate)
    by_up = grad_output * gate * sigmoid
    return grad_output * up * sigmoid * (1 + gate * (1 - sigmoid)), by_up


@mx.custom_function
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu(gate) * up`, tanh's GELU; kept for the backward pass: these two only."""
    return nn.gelu_approx(gate) * up


@gated_gelu.vjp
def _gated_gelu_back(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    return _gelu_back(gate, up, grad_output)


@partial(mx.compile, shapeless=True)
def _gelu_back(gate: mx.array, up: mx.array, grad_output: mx.array) -> tuple[mx.array, mx.array]:
    derivative, cube = math.sqrt(2 / math.pi), 0.044715
    square = mx.square(gate)
    tanh = mx.tanh(derivative * gate * (1 + cube * square))
    by_up = grad_output * (0.5 * gate * (1 + tanh))
    by_gate = 0.5 * (1 + tanh) + 0.5 * gate * (1 - mx.square(tanh)) * (derivative * (1 + 3 * cube * square))
    return grad_output * up * by_gate, by_up


def feed_forward(self: Any, x: mx.array) -> mx.array:
    """A layer's MLP, for all families. `self` is mlx-lm's module."""
    if "gate_up_proj" in self:  # Phi-3
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
    else:
        gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj((gated_gelu if self.gelu else gated_silu)(gate, up))


def take_over(model: Any, gelu: bool) -> None:
    """Each layer's parts get classes of their own, so that no other model of the process is touched."""
    for layer in model.layers:
        _replace_call(layer.self_attn, attend)
        _replace_call(layer.mlp, feed_forward)
        layer.mlp.gelu = gelu


def _replace_call(module: Any, call: Any) -> None:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

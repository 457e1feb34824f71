"""Attention over rows of unequal length that lie end to end: padding exists inside it only, nowhere else."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch, end to end, stand among its padded positions [B, T]."""

    count: int
    width: int
    places: mx.array | None  # [tokens] int32; None: all rows are as long, nothing is padded

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
    queries, keys = self.rope(queries), self.rope(keys)
    if (cap := getattr(self, "attn_logit_softcapping", None)) is None:
        result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
    else:  # Gemma 2: MLX has no kernel that caps the scores
        shape = queries.shape
        queries = queries.reshape(shape[0], self.n_kv_heads, -1, *shape[2:])
        scores = mx.tanh((queries @ keys[:, :, None].swapaxes(-1, -2)) * (self.scale / cap)) * cap
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        result = (mx.softmax(scores, precise=True, axis=-1) @ values[:, :, None]).reshape(shape)
    return self.o_proj(rows.gather(result))


def take_over(model: Any) -> None:
    """Each attention of the model gets a class of its own, so that no other model of the process is touched."""
    for layer in model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type(kind.__name__, (kind,), {"__call__": attend})

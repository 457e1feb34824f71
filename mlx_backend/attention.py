"""Attention over packed rows of unequal length: padding exists inside it only, nowhere else."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class RaggedRows:
    """Where the packed tokens of a micro-batch belong among its padded positions [B, T]."""

    count: int  # B
    width: int  # T
    indices: mx.array | None  # [tokens] int32; None: all rows have the same length, nothing is padded
    cache: Any = None  # mlx-lm's KVCache of this layer, when generating: these are its one row's newest tokens

    def pad(self, x: mx.array) -> mx.array:
        """[tokens, heads, d] -> [B, heads, T, d], zeros after the end of a row."""
        if self.indices is not None:
            padded = mx.zeros((self.count * self.width, *x.shape[1:]), x.dtype)
            padded[self.indices] = x
            x = padded
        return x.reshape(self.count, self.width, *x.shape[1:]).transpose(0, 2, 1, 3)

    def unpad(self, x: mx.array) -> mx.array:
        """[B, heads, T, d] -> [tokens, heads * d]."""
        flat = x.transpose(0, 2, 1, 3).reshape(self.count * self.width, -1)
        return flat if self.indices is None else flat[self.indices]


def attend(self: Any, x: mx.array, mask: Any, rows: RaggedRows) -> mx.array:
    """The output [tokens, hidden] of a layer's attention, in all families, for x [tokens, hidden].

    `self` is mlx-lm's module, whose own call would pad everything. Rows are padded on the right, so no real token sees
    padding.
    """
    queries, keys, values = _projected(self, x)
    norms = _norms(self)
    if norms and norms[0].weight.size == queries.shape[-1]:  # OLMo: all heads as one
        queries, keys, norms = norms[0](queries), norms[1](keys), None
    heads, key_heads = _head_counts(self)
    queries = queries.reshape(len(x), heads, -1)
    keys, values = (part.reshape(len(x), key_heads, -1) for part in (keys, values))
    gate = None
    if queries.shape[-1] > keys.shape[-1]:  # Qwen3.5: the other half says how much of each output passes
        queries, gate = mx.split(queries, 2, axis=-1)
    if norms:
        queries, keys = norms[0](queries), norms[1](keys)
    queries, keys, values = rows.pad(queries), rows.pad(keys), rows.pad(values)
    cached = 0 if rows.cache is None else rows.cache.offset
    queries, keys = self.rope(queries, cached), self.rope(keys, cached)
    if hasattr(self, "query_scaling"):  # Ministral 3
        queries = _scaled(queries, cached, *self.query_scaling)
    if rows.cache is not None:
        keys, values = rows.cache.update_and_fetch(keys, values)
    if (cap := getattr(self, "attn_logit_softcapping", None)) is None:
        result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
    else:  # Gemma 2: MLX has no kernel that caps the scores
        shape = queries.shape
        queries = queries.reshape(shape[0], key_heads, -1, *shape[2:])
        scores = mx.tanh((queries @ keys[:, :, None].swapaxes(-1, -2)) * (self.scale / cap)) * cap
        scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
        result = (mx.softmax(scores, precise=True, axis=-1) @ values[:, :, None]).reshape(shape)
    result = rows.unpad(result)
    if gate is not None:
        result = result * mx.sigmoid(gate.reshape(result.shape))
    return (self.o_proj if "o_proj" in self else self.out_proj)(result)


def _scaled(queries: mx.array, cached: int, beta: float, length: int) -> mx.array:
    """Queries [B, heads, T, d] of positions from `cached` on, larger the more often `length` fits into a position."""
    if cached + queries.shape[2] <= length:
        return queries
    turns = mx.floor((mx.arange(queries.shape[2]) + cached) / length)
    return queries * (1 + beta * mx.log(1 + turns)).astype(queries.dtype)[:, None]


def _norms(self: Any) -> tuple[Any, Any] | None:
    """Of queries and of keys, where the family has such."""
    if "q_layernorm" in self:  # LFM2
        return self.q_layernorm, self.k_layernorm
    return (self.q_norm, self.k_norm) if "q_norm" in self else None


def _head_counts(self: Any) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    if not hasattr(self, "n_heads"):
        return self.num_attention_heads, self.num_key_value_heads
    return self.n_heads, self.n_kv_heads


def _projected(self: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values."""
    if "qkv_proj" not in self:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)
    queries, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim  # Phi-3: one matrix for the three
    parts: Any = mx.split(self.qkv_proj(x), [queries, queries + keys], axis=-1)
    return parts

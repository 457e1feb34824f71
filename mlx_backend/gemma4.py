"""Gemma 4's layers: shared keys and values, heads of unequal width, and embeddings of each layer."""

from typing import Any

import mlx.core as mx

from mlx_backend.attention import RaggedRows

KeysAndValues = tuple[mx.array, mx.array]


def attend(
    self: Any, x: mx.array, mask: Any, rows: RaggedRows, shared_kv: KeysAndValues | None = None, offset: None = None
) -> tuple[mx.array, KeysAndValues, None]:
    """`(the output [tokens, hidden] of a layer's attention for x [tokens, hidden], its keys and values, None)`.

    `self` is mlx-lm's module, and its layer dictates the signature. shared_kv: an earlier layer's keys and values
    [B, heads, T, d], where this one has none of its own.
    """
    queries = rows.pad(self.q_norm(self.q_proj(x).reshape(len(x), self.n_heads, -1)))
    if shared_kv is None:
        shared_kv = _keys_and_values(self, x, rows)
    keys, values = shared_kv
    queries = self.rope(queries, keys.shape[2] - queries.shape[2])
    result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=mask)
    return self.o_proj(rows.unpad(result)), shared_kv, None


def _keys_and_values(self: Any, x: mx.array, rows: RaggedRows) -> KeysAndValues:
    keys = self.k_proj(x).reshape(len(x), self.n_kv_heads, -1)
    values = keys if self.use_k_eq_v else self.v_proj(x).reshape(len(x), self.n_kv_heads, -1)
    keys, values = rows.pad(self.k_norm(keys)), rows.pad(self.v_norm(values))
    if rows.cache is None:
        return self.rope(keys), values
    found: KeysAndValues = rows.cache.update_and_fetch(self.rope(keys, rows.cache.offset), values)
    return found


def run_layers(
    model: Any, input_ids: mx.array, h: mx.array, masks: list[mx.array | str], rows: list[RaggedRows]
) -> mx.array:
    """The output [tokens, hidden] of all layers. h: the embeddings of input ids [tokens]; masks, rows: each layer's."""
    inputs, sources = _layer_inputs(model.model, input_ids, h), model.model.previous_kvs
    wanted = {source for number, source in enumerate(sources) if source != number}
    found: dict[int, KeysAndValues] = {}
    for number, layer in enumerate(model.layers):
        own = None if inputs is None else inputs[:, number]
        h, shared, _ = layer(h, masks[number], rows[number], per_layer_input=own, shared_kv=found.get(sources[number]))
        if number in wanted:
            found[number] = shared
    return h


def _layer_inputs(model: Any, input_ids: mx.array, h: mx.array) -> mx.array | None:
    """[tokens, layers, d]: each layer's own embeddings of the tokens, and a projection of h; None of a model without.

    The table is large, and stays in the type in which it is stored: what is looked up is converted.
    """
    if not (width := model.hidden_size_per_layer_input):
        return None
    own = model.embed_tokens_per_layer(input_ids).astype(h.dtype) * model.embed_tokens_per_layer_scale
    projected = model.per_layer_model_projection(h) * model.per_layer_projection_scale
    projected = model.per_layer_projection_norm(projected.reshape(len(h), -1, width))
    return (projected + own.reshape(len(h), -1, width)) * model.per_layer_input_scale

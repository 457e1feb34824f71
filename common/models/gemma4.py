"""Gemma 4: layers with heads of unequal width, shared keys and values, and embeddings of each layer.

Sources: huggingface/transformers, models/gemma4 and models/gemma4_unified. The latter, the 12B, has no embeddings of
each layer, and is computed alike otherwise.
"""

from typing import Any

KINDS = ("gemma4_text", "gemma4_unified_text")
_ROPES = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def has_experts(config: dict[str, Any]) -> bool:
    """Whether the layers of this text config are mixtures of experts."""
    return bool(config.get("enable_moe_block"))


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """The text config, which is changed and has its family's defaults, with every other setting explicit.

    transformers 5.24 writes what differs in layers of full attention as `per_layer_config`. The hub's configs, and the
    other readers, have `global_head_dim` and `num_global_key_value_heads`.
    """
    if config.get("layer_types") is None:
        count = config["num_hidden_layers"]
        config["layer_types"] = [_name((i + 1) % 6 == 0 or i + 1 == count) for i in range(count)]
    unlike = config.pop("per_layer_config", None)
    for layer in (unlike or {}).values():
        config |= {_GLOBAL[key]: value for key, value in layer.items() if key in _GLOBAL}
    config.setdefault("global_head_dim", 512 if unlike is None else config["head_dim"])
    config["hidden_size_per_layer_input"] = config.get("hidden_size_per_layer_input") or 0
    if not config["attention_k_eq_v"]:  # then nobody but llama.cpp reads it
        config["num_global_key_value_heads"] = None
    config.setdefault("num_global_key_value_heads", None)
    config["rope_parameters"] = config.get("rope_parameters") or {name: dict(rope) for name, rope in _ROPES.items()}
    return config


def _name(full: bool) -> str:
    return "full_attention" if full else "sliding_attention"


def heads(text: dict[str, Any], layer: int) -> tuple[int, int]:
    """`(width of a head, heads of keys and values)` of a layer. text: normalized."""
    if text["layer_types"][layer] == "sliding_attention":
        return text["head_dim"], text["num_key_value_heads"]
    return text["global_head_dim"], text["num_global_key_value_heads"] or text["num_key_value_heads"]


def shares(text: dict[str, Any], layer: int) -> bool:
    """Whether the layer attends to the keys and values of an earlier one."""
    return bool(layer >= text["num_hidden_layers"] - text["num_kv_shared_layers"])


def inner(text: dict[str, Any], layer: int) -> int:
    """The width of the layer's MLP."""
    return int(text["intermediate_size"] * (2 if text["use_double_wide_mlp"] and shares(text, layer) else 1))


def shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model's tensors, from its normalized config, as transformers saves them."""
    hidden, count = text["hidden_size"], text["num_hidden_layers"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer in range(count):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(text, layer).items()}
    if own := text.get("hidden_size_per_layer_input"):
        found["model.embed_tokens_per_layer.weight"] = (text["vocab_size_per_layer_input"], count * own)
        found["model.per_layer_model_projection.weight"] = (count * own, hidden)
        found["model.per_layer_projection_norm.weight"] = (own,)
    found["model.norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        found["lm_head.weight"] = (text["vocab_size"], hidden)
    return found


def _layer_shapes(text: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    hidden, mlp = text["hidden_size"], inner(text, layer)
    width, key_heads = heads(text, layer)
    queries, keys = text["num_attention_heads"] * width, key_heads * width
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (width,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "layer_scalar": (1,),
    }
    if not shares(text, layer):
        found |= {"self_attn.k_proj.weight": (keys, hidden), "self_attn.k_norm.weight": (width,)}
        if not (text["attention_k_eq_v"] and text["layer_types"][layer] == "full_attention"):
            found["self_attn.v_proj.weight"] = (keys, hidden)
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if own := text.get("hidden_size_per_layer_input"):
        found |= {"per_layer_input_gate.weight": (own, hidden), "per_layer_projection.weight": (hidden, own)}
        norms.append("post_per_layer_input_norm")
    return found | {f"{name}.weight": (hidden,) for name in norms}


def faults(text: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What the two backends would compute differently, or not at all: a line each. given: before `normalize`."""
    kinds, ropes = text["layer_types"], text["rope_parameters"]
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    if first < 1 or not {*kinds[first:]} <= {*kinds[:first]}:
        return ["its num_kv_shared_layers leave no layer whose keys and values the others could share"]
    if kinds[-1] != "full_attention":
        return ["its last layer is not one of full_attention, as transformers wants it"]
    if not {*kinds} <= {*ropes}:
        return [f"its rope_parameters lack {min({*kinds} - {*ropes})}"]
    found = _layer_faults(text, given.get("per_layer_config") or {})
    if any(text["num_attention_heads"] % heads(text, layer)[1] for layer in range(len(kinds))):
        found.append(f"its {text['num_attention_heads']} attention heads do not fit the key heads of every layer")
    own, rows = text.get("hidden_size_per_layer_input"), text.get("vocab_size_per_layer_input")
    if own and rows != text["vocab_size"]:
        found.append(f"its embeddings of each layer have {rows} rows, and its vocabulary has {text['vocab_size']}")
    if first < len(kinds) and not own and text["model_type"] == "gemma4_text":
        found.append("its layers share keys and values without embeddings of each layer, and transformers fails there")
    if text["attention_bias"]:
        found.append("its attention has biases, which the MLX backend does not compute for this family")
    full, sliding = (ropes.get(name, _ROPES[name]) for name in ("full_attention", "sliding_attention"))
    if full.get("rope_type") != "proportional" or sliding.get("rope_type", "default") != "default":
        found.append("its RoPE is not 'proportional' in full attention and 'default' elsewhere, as a Gemma 4 has it")
    elif "rope_theta" not in sliding or not {"rope_theta", "partial_rotary_factor"} <= full.keys():
        found.append("its RoPE lacks a rope_theta or a partial_rotary_factor")
    elif sliding.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("its partial_rotary_factor of sliding_attention is not computed by both backends")
    elif full.get("factor", 1.0) != 1.0:
        found.append("its RoPE's factor is not read by llama.cpp and by transformers alike")
    return found


def _layer_faults(text: dict[str, Any], layers: dict[str, Any]) -> list[str]:
    """Of a `per_layer_config`, which can say more than the other readers know."""
    full = {str(i) for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"}
    changes = [dict(layer) for layer in layers.values()]
    alike = all(one == changes[0] and one.keys() <= {*_GLOBAL} for one in changes)
    if layers and ({*map(str, layers)} != full or not alike):
        return ["its per_layer_config is not the same for all layers of full_attention, and for these alone"]
    if changes and "num_key_value_heads" in changes[0] and not text["attention_k_eq_v"]:
        return ["its layers of full_attention have key heads of their own without attention_k_eq_v"]
    return []

"""LFM2: gated short convolutions in most layers, in place of attention.

Source: huggingface/transformers, models/lfm2. The first configs have other names for the sizes (`block_ff_dim`,
`full_attn_idxs`), and the width of the MLP is computed from what they state.
"""

from typing import Any

KIND = "lfm2"
CONVOLUTION = "conv"  # a layer's type


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """The config, which is changed and has its family's defaults, as every reader understands it."""
    layers = range(config["num_hidden_layers"])
    if config["layer_types"] is None:
        attending = config["full_attn_idxs"] if config["full_attn_idxs"] is not None else layers
        config["layer_types"] = ["full_attention" if i in attending else CONVOLUTION for i in layers]
    if config.get("block_ff_dim") is None:
        config["block_ff_dim"] = config["intermediate_size"]
    kinds = config["layer_types"]
    return config | {
        "full_attn_idxs": [i for i, kind in enumerate(kinds) if kind != CONVOLUTION],  # what mlx-lm reads first
        "intermediate_size": config["block_ff_dim"],
        "block_dim": config["hidden_size"],
        "tie_word_embeddings": config.pop("tie_embedding", config["tie_word_embeddings"]),
    }


def inner(config: dict[str, Any]) -> int:
    """The width of the MLP."""
    width: int = config["intermediate_size"]
    if not config["block_auto_adjust_ff_dim"]:
        return width
    multiple = config["block_multiple_of"]
    return -(-int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)) // multiple) * multiple


def shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, from a normalized config."""
    hidden = text["hidden_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer, kind in enumerate(text["layer_types"]):
        of_kind = _convolution(text) if kind == CONVOLUTION else _attention(text)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in (of_kind | _mlp(text)).items()}
    found["model.embedding_norm.weight"] = (hidden,)
    if not text["tie_word_embeddings"]:
        found["lm_head.weight"] = (text["vocab_size"], hidden)
    return found


def _convolution(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = text["hidden_size"]
    weights: dict[str, tuple[int, ...]] = {
        "conv.conv": (hidden, 1, text["conv_L_cache"]),
        "conv.in_proj": (3 * hidden, hidden),
        "conv.out_proj": (hidden, hidden),
    }
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()} if text["conv_bias"] else {}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def _attention(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * width, text["num_key_value_heads"] * width
    return {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.out_proj.weight": (hidden, queries),
        "self_attn.q_layernorm.weight": (width,),
        "self_attn.k_layernorm.weight": (width,),
    }


def _mlp(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """And the norms before both parts of a layer."""
    hidden, width = text["hidden_size"], inner(text)
    return {
        "feed_forward.w1.weight": (width, hidden),
        "feed_forward.w2.weight": (hidden, width),
        "feed_forward.w3.weight": (width, hidden),
        "operator_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }

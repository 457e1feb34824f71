"""Whether the values of a config are of the kinds that its readers take for granted; it may be a stranger's."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

_LARGEST = 2**31
_MOST_LAYERS = 1_000  # what holds for each layer is listed in several places
LAYER_TYPES = ("full_attention", "sliding_attention")  # of the known architectures


class _Kind(NamedTuple):
    fits: Callable[[Any], bool]
    text: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _are_layers(value: Any) -> bool:
    """Whether it has numbers by name for some layers."""
    layers = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(layer, dict) and all(map(_is_count, layer.values())) for layer in layers)


def _optional(kind: _Kind) -> _Kind:
    return _Kind(lambda value: value is None or kind.fits(value), kind.text)


_COUNT = _Kind(_is_count, "a whole number from 1")
_NUMBER = _Kind(_is_number, "a number")
_POSITIVE = _Kind(_is_positive, "a number above 0")
_SWITCH = _Kind(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Kind(lambda value: isinstance(value, str), "a text")
_ID = _Kind(_is_id, "a token's number")
_SIZE = _Kind(_is_id, "a whole number from 0")

_KINDS: dict[str, _Kind] = {
    "architectures": _optional(_Kind(_are(_TEXT.fits), "a list of names")),
    "num_hidden_layers": _Kind(lambda value: _is_count(value) and value <= _MOST_LAYERS, f"1 to {_MOST_LAYERS}"),
    "max_window_layers": _Kind(lambda value: type(value) is int, "a whole number"),
    "layer_types": _optional(_Kind(_are(_TEXT.fits), "a list of names")),
    "no_rope_layers": _optional(_Kind(_are(lambda part: part in (0, 1)), "a list of 0 and 1")),
    "eos_token_id": _optional(_Kind(lambda value: _is_id(value) or _are(_is_id)(value), "one or more token numbers")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _optional(_ID)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), _COUNT),
    **dict.fromkeys(("head_dim", "num_key_value_heads"), _optional(_COUNT)),
    "sliding_window": _optional(_Kind(_is_id, "a whole number")),
    "sliding_window_pattern": _optional(
        _Kind(lambda value: _is_count(value) or isinstance(value, str), "a number or letters")
    ),
    **dict.fromkeys(("no_rope_layer_interval", "full_attention_interval"), _COUNT),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim"), _COUNT),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _COUNT),
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar", "logits_scaling"), _POSITIVE),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), _POSITIVE),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), _NUMBER),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), _optional(_POSITIVE)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), _optional(_SWITCH)),
    "use_sliding_window": _optional(_SWITCH),
    "use_bidirectional_attention": _optional(
        _Kind(lambda value: isinstance(value, bool) or value in ("all", "vision"), "true, false, all or vision")
    ),
    # Granite 4's
    "shared_intermediate_size": _SIZE,  # a MiniMax-M2 writes 0
    "num_local_experts": _optional(_SIZE),
    "position_embedding_type": _optional(_TEXT),
    # LFM2's
    "conv_L_cache": _Kind(lambda value: _is_count(value) and value > 1, "a whole number from 2"),
    **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim", "tie_embedding"), _SWITCH),
    **dict.fromkeys(("norm_eps", "block_ffn_dim_multiplier"), _POSITIVE),
    "block_multiple_of": _COUNT,
    "block_ff_dim": _optional(_COUNT),
    "full_attn_idxs": _optional(_Kind(_are(_is_id), "a list of layers' numbers")),
    # Gemma 4's
    **dict.fromkeys(("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp"), _optional(_SWITCH)),
    **dict.fromkeys(("global_head_dim", "vocab_size_per_layer_input"), _COUNT),
    "num_global_key_value_heads": _optional(_COUNT),
    "hidden_size_per_layer_input": _optional(_SIZE),
    "num_kv_shared_layers": _SIZE,
    "per_layer_config": _optional(_Kind(_are_layers, "an object of settings for each layer")),
    **dict.fromkeys(("model_type", "hidden_act", "hidden_activation"), _TEXT),
    "original_max_position_embeddings": _optional(_COUNT),
}
_GENERATION_KINDS = {"eos_token_id": _KINDS["eos_token_id"], "temperature": _optional(_NUMBER)}
_ROPE_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor"), _POSITIVE),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), _optional(_POSITIVE)),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale"), _optional(_POSITIVE)),
    **dict.fromkeys(("mscale_all_dim", "llama_4_scaling_beta"), _optional(_NUMBER)),
    **dict.fromkeys(("short_factor", "long_factor"), _Kind(_are(_is_positive), "a list of numbers above 0")),
    "original_max_position_embeddings": _optional(_COUNT),
    "truncate": _SWITCH,
}


def kind_faults(config: dict[str, Any]) -> list[str]:
    """A line for each value that is of another kind than its key's; of a multimodal config its text part's too."""
    faults = _wrong(config, _KINDS)
    for name in ("text_config", "vision_config"):
        if name in config and not isinstance(config[name], dict):
            faults.append(f"{name} is not an object")
    if isinstance(text := config.get("text_config"), dict):
        faults += [f"text_config.{fault}" for fault in kind_faults(text)]
    for name in ("layer_types", "no_rope_layers"):
        if not faults and config.get(name) is not None and len(config[name]) != config.get("num_hidden_layers"):
            faults.append(f"{name} has {len(config[name])} entries, one for each layer it should have")
    for name in ("rope_parameters", "rope_scaling"):
        faults += _rope_faults(name, config.get(name))
    return faults


def generation_faults(config: dict[str, Any]) -> list[str]:
    """A line for each value of a generation_config.json that is of another kind than its readers take for granted."""
    return _wrong(config, _GENERATION_KINDS)


def _rope_faults(name: str, rope: Any) -> list[str]:
    if rope is None:
        return []
    if not isinstance(rope, dict):
        return [f"{name} is not an object"]
    faults = [f"{name}.{fault}" for fault in _wrong(rope, _ROPE_KINDS)]
    return faults + [fault for kind in LAYER_TYPES for fault in _rope_faults(f"{name}.{kind}", rope.get(kind))]


def _wrong(content: dict[str, Any], kinds: dict[str, _Kind]) -> list[str]:
    return [
        f"{key} is {str(content[key])[:40]!r}, and should be {kind.text}"
        for key, kind in kinds.items()
        if key in content and not kind.fits(content[key])
    ]

"""A config's RoPE, explicit as transformers 5 understands it, and under the keys of older readers."""

import math
from typing import Any

from common.models.family_defaults import DEFAULTS

ROPES_BY_KIND = ("gemma3_text", "olmo3")  # each kind of layer has RoPE parameters of its own
# Where a config names none: theta, if it is not 10,000, and the share of a head that RoPE rotates.
_BASES = {"gpt_oss": 1.5e5, "lfm2": 1e6, "smollm3": 2e6}
_ROTARY = {"glm4": 0.5, "phi3": 1.0, "qwen3_5_text": 0.25}


def normalize_rope(config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """The config, which is changed, with every RoPE setting explicit. kind: the model type."""
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if kind in ROPES_BY_KIND or "full_attention" in given:  # one set for each kind of layer
        base = config.get("rope_theta", 5e5 if kind == "olmo3" else 1e6)
        rope = {"rope_theta": base, **(given.get("full_attention") or {}), **scaling}
        local = given.get("sliding_attention") or {}
        local = {"rope_theta": config.get("rope_local_base_freq", base if kind == "olmo3" else 1e4), **local}
        if kind != "olmo3":
            config["rope_local_base_freq"] = local["rope_theta"]
    elif kind in DEFAULTS or given or "rope_theta" in config:
        base = config.get("rope_theta", _BASES.get(str(kind), 1e4))
        rope, local = {"rope_theta": base, **(scaling or given)}, None
    else:
        return config
    for one in (rope, local):
        if one is not None:
            _name_rope(one, config, kind)
    config["rope_parameters"] = rope if local is None else {"full_attention": rope, "sliding_attention": local}
    config["rope_theta"] = rope["rope_theta"]
    if (kind not in DEFAULTS or kind == "glm4") and "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    # before transformers 4.43 the key was `type`, and some readers know nothing else
    plain = rope["rope_type"] == "default" and "mrope_section" not in rope
    config["rope_scaling"] = None if plain else scaling | {"type": rope["rope_type"]}
    return config


def for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The normalized config as transformers 4 opens it too: for Phi-3's longrope it wants these three keys, no other.

    What the others say stands in the config itself. A longrope that says more stays as it is.
    """
    rope, own = config.get("rope_scaling") or {}, ("partial_rotary_factor", "original_max_position_embeddings")
    short = {key: rope[key] for key in ("type", "short_factor", "long_factor") if key in rope}
    if config.get("model_type") != "phi3" or len(short) != 3 or rope.keys() - {"rope_type", *own, *short}:
        return config
    return {**config, **{key: rope[key] for key in own if key in rope}, "rope_scaling": short}


def _name_rope(rope: dict[str, Any], config: dict[str, Any], kind: str | None) -> None:
    older = rope.pop("type", "default")
    rope.setdefault("rope_type", older)
    if rope["rope_type"] == "mrope":
        rope["rope_type"] = "default"
    if kind == "phi3" and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"  # its first names
    if (share := config.get("partial_rotary_factor", _ROTARY.get(str(kind)))) is not None:
        rope.setdefault("partial_rotary_factor", share)
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if "original_max_position_embeddings" in config:
            rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        elif "max_position_embeddings" in config:
            rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])


def yarn_scale(rope: dict[str, Any]) -> float | None:
    """What YaRN scales queries and keys by; None of another RoPE, or where no factor is stated."""
    if rope.get("rope_type") != "yarn" or not rope.get("factor"):
        return None
    if (stated := rope.get("attention_factor")) is not None:
        return float(stated)
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    return yarn_ratio(rope, over, under) if over and under else yarn_ratio(rope, 1, 0)


def yarn_ratio(rope: dict[str, Any], over: float, under: float) -> float:
    """The scale of a reader that takes these for `mscale` and `mscale_all_dim`."""
    grown = 0.1 * math.log(max(1.0, rope["factor"]))
    return (over * grown + 1) / (under * grown + 1)


def unrounded_yarn(rope: dict[str, Any]) -> bool:
    """Whether the range over which YaRN blends its frequencies is not rounded to whole pairs of values."""
    return rope.get("rope_type") == "yarn" and not rope.get("truncate", True)

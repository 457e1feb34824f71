"""Granite 4 without Mamba layers and experts: Granite 3 with another MLP, and RoPE or none.

Source: huggingface/transformers, models/granitemoehybrid. mlx-lm has gate and up of the MLP as matrices of their own,
under other names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from common.backend import LoraWeight

KIND = "granitemoehybrid"
_JOINED, _DOWN = "shared_mlp.input_linear", "shared_mlp.output_linear"
_MLX_PARTS, _MLX_DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
# No layer reads them. transformers and llama.cpp's converter want them all the same, and that they fit each other.
_UNREAD = {
    **{"mamba_expand": 2, "mamba_n_heads": 1, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4},
    **{"num_experts_per_tok": 0, "mlp_bias": False},
}


def is_dense(config: dict[str, Any]) -> bool:
    """Whether every layer is attention and one MLP. Where the config says nothing it is not."""
    layers = config.get("layer_types")
    attention = isinstance(layers, list) and all(one in ("attention", "full_attention") for one in layers)
    return attention and config.get("num_local_experts") == 0 and config.get("shared_intermediate_size") != 0


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a dense model, which is changed and has its family's defaults, as every reader understands it."""
    config["layer_types"] = ["attention" for _ in config["layer_types"]]  # mlx-lm and llama.cpp know no other name
    rotated = config["position_embedding_type"] == "rope"
    config["position_embedding_type"] = "rope" if rotated else "nope"  # which mlx-lm wants said
    config["intermediate_size"] = config["shared_intermediate_size"]  # the others' name for it
    config.pop("time_step_limit", None)
    return config | _UNREAD | {"mamba_d_head": 2 * config["hidden_size"]}


def is_divided(kind: str, names: Iterable[str]) -> bool:
    """Whether these are a Granite 4's tensors under mlx-lm's names. kind: the model type."""
    return kind == KIND and any(name.endswith(f"{_MLX_PARTS[0]}.weight") for name in names)


def as_in_mlx(weights: Mapping[str, LoraWeight]) -> dict[str, LoraWeight]:
    """An adapter's weights under mlx-lm's names: the rows of what is joined here are divided."""
    found: dict[str, LoraWeight] = {}
    for name, weight in weights.items():
        if not name.endswith(_JOINED):
            found[name.removesuffix(_DOWN) + _MLX_DOWN if name.endswith(_DOWN) else name] = weight
            continue
        lengths = [None, None] if weight.magnitude is None else np.split(weight.magnitude, 2)
        for part, B, magnitude in zip(_MLX_PARTS, np.split(weight.B, 2), lengths, strict=True):
            found[name.removesuffix(_JOINED) + part] = replace(weight, B=B, magnitude=magnitude)
    return found


def from_mlx(weights: Mapping[str, LoraWeight]) -> dict[str, LoraWeight] | None:
    """The weights that `as_in_mlx` divided; None where these are others."""
    found: dict[str, LoraWeight] = {}
    gate, up = _MLX_PARTS
    for name, weight in weights.items():
        if name.endswith(gate):
            other = weights.get(name.removesuffix(gate) + up)
            if other is None or not np.array_equal(weight.A, other.A):
                return None
            lengths = [one for one in (weight.magnitude, other.magnitude) if one is not None]
            magnitude = np.concatenate(lengths) if lengths else None
            joined = replace(weight, B=np.concatenate([weight.B, other.B]), magnitude=magnitude)
            found[name.removesuffix(gate) + _JOINED] = joined
        elif not name.endswith(up):
            found[name.removesuffix(_MLX_DOWN) + _DOWN if name.endswith(_MLX_DOWN) else name] = weight
    return found

"""A tiny random model of every family, drawn by numpy, on which the two backends are compared."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.models.families import architecture_alone
from common.models.shapes import tensor_shapes

_SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 3.0, 6.0],
    "original_max_position_embeddings": 48,
}
_PROPORTIONAL = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
# What distinguishes each family. Every constant differs from its default, so that a lost one shows in the logits.
# Rows in tests are longer than the windows and the original contexts here.
_GRANITE = {
    "tie_word_embeddings": True,
    "attention_bias": True,
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.7,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
TINY: dict[str, dict[str, Any]] = {
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "sliding_window_pattern": "LLGL",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": _LLAMA3,
    },
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "sliding_window": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
    },
    "gemma4_text": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "head_dim": 16,
        "per_layer_config": {str(layer): {"head_dim": 24} for layer in (2, 4)},
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
        "sliding_window": 24,
        "final_logit_softcapping": 5.0,
        "rope_parameters": _PROPORTIONAL,
    },
    "gemma4_unified_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "head_dim": 16,
        "per_layer_config": {"2": {"head_dim": 24, "num_key_value_heads": 1}},
        "sliding_window": 24,
        "final_logit_softcapping": 6.0,
        "use_bidirectional_attention": None,
        "rope_parameters": _PROPORTIONAL,
    },
    "glm4": {
        "head_dim": 24,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    },
    "granite": _GRANITE,
    "granitemoehybrid": _GRANITE
    | {
        "layer_types": ["full_attention"] * 2,
        "num_local_experts": 0,
        "intermediate_size": 48,  # which no layer reads
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
    },
    "lfm2": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "tie_word_embeddings": True,
        "norm_eps": 1e-3,
        "conv_bias": True,
        "conv_L_cache": 4,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.3,  # 64 * 1.3 are rounded up to 96
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "llama": {"tie_word_embeddings": False, "mlp_bias": True, "rope_parameters": _LLAMA3},
    "mistral": {
        "head_dim": 24,
        "sliding_window": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "ministral3": {
        "head_dim": 24,
        "sliding_window": 40,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "llama_4_scaling_beta": 0.4,
            "original_max_position_embeddings": 16,
        },
    },
    "olmo2": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    },
    "olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 24,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "attention_factor": 1.2,
                "original_max_position_embeddings": 32,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "phi3": {"sliding_window": 56, "original_max_position_embeddings": 48, "rope_parameters": _LONGROPE},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "qwen3": {
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    },
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 16,
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "smollm3": {
        "num_hidden_layers": 4,
        "no_rope_layer_interval": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
}


def tiny_config(family: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of a tiny model of `family`, a model type, as transformers 5 writes it."""
    return {
        "architectures": [architecture_alone(family)],
        "model_type": family,
        **_SHAPE,
        **deepcopy(TINY[family]),
        **(changes or {}),
    }


def write_tiny(folder: Path, family: str, changes: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A float32 model without a tokenizer, under 1 MB: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, changes)
    random, centered = np.random.default_rng([seed, 7]), family.startswith(("gemma2", "gemma3", "qwen3_5"))
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        # larger than a usual start, so that differences show
        drawn = random.normal(0, 0.15 if len(shape) == 2 else 0.3, shape)
        if name.endswith(("norm.weight", "layer_scalar")) and not (centered and ".linear_attn." not in name):
            drawn += 1  # the others add the one themselves
        if family.startswith("gemma4"):  # nothing scales its scores, and large ones magnify what is rounded
            drawn /= 4 if name.endswith("q_norm.weight") else 2 if ".post_" in name else 1
        tensors[name] = drawn.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    return folder

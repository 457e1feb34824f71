"""Models that people tune, by name: their configs (what matters of them) are supported, and have as many weights.

The configs and counts are those of the models on the Hugging Face hub.
"""

import math
from typing import Any

import pytest

from common.models.config_faults import config_faults
from common.models.config_kinds import kind_faults
from common.models.families import context_length, forward_config, text_config
from common.models.shapes import tensor_shapes
from common.presets import published_configs

_QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
_LLAMA_3_1: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
_GEMMA_3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "vocab_size": 262144,
}
_QWEN_3_5_27B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_text",
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "vocab_size": 248320,
    },
}
_LFM_2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "conv_L_cache": 3,
    "conv_bias": False,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "vocab_size": 65536,
}
# Name -> config, its language model's weights, its context in tokens.
KNOWN: dict[str, tuple[dict[str, Any], int, int]] = {
    "microsoft/phi-4": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 10,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
            "rope_scaling": None,
            "sliding_window": None,
            "pad_token_id": 100349,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
        14_659_507_200,
        16384,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        _QWEN_1_5B | {"tie_word_embeddings": False, "rope_theta": 10000, "max_position_embeddings": 131072},
        1_777_088_000,
        131072,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (_LLAMA_8B | _LLAMA_3_1, 8_030_261_248, 131072),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000,
            "rope_scaling": {
                "attn_factor": 0.8782488562869419,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "rope_type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        8_190_735_360,
        131072,
    ),
    "google/medgemma-27b-text-it": (
        _GEMMA_3
        | {
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        27_009_002_240,
        131072,
    ),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (_QWEN_1_5B, 1_543_714_304, 32768),
    "elyza/Llama-3-ELYZA-JP-8B": (_LLAMA_8B, 8_030_261_248, 8192),
    "tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3": (_LLAMA_8B | _LLAMA_3_1, 8_030_261_248, 131072),
    "LiquidAI/LFM2-350M": (
        _LFM_2
        | {
            "block_auto_adjust_ff_dim": True,
            "block_ff_dim": 6656,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
        },
        354_483_968,
        128000,
    ),
    "LiquidAI/LFM2-700M": (
        _LFM_2
        | {
            "block_auto_adjust_ff_dim": True,
            "block_ff_dim": 10240,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "num_hidden_layers": 16,
        },
        742_489_344,
        128000,
    ),
    "LiquidAI/LFM2-2.6B": (
        _LFM_2
        | {
            "block_auto_adjust_ff_dim": False,
            "block_ff_dim": 10752,
            "full_attn_idxs": [2, 5, 9, 13, 17, 21, 24, 27],
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 30,
        },
        2_569_272_320,
        128000,
    ),
    "LiquidAI/LFM2.5-1.2B-Instruct": (
        {key: value for key, value in _LFM_2.items() if key != "rope_theta"}
        | {
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "hidden_size": 2048,
            "intermediate_size": 12288,
            "layer_types": [
                *["conv", "conv", "full_attention"] * 2,
                *("conv", "conv", *["full_attention", "conv"] * 4),
            ],
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        1_170_340_608,
        128000,
    ),
    "google/gemma-4-31B-it": (
        {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "attention_k_eq_v": True,
            "hidden_size": 5376,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": 21504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "final_logit_softcapping": 30.0,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
        },
        30_697_345_340,  # Google states 30.7 billion
        262144,
    ),
}
# Of the models in configs/models.json: weights, context in tokens.
PUBLISHED = {
    "google/gemma-3-270m": (268_098_176, 32768),
    "google/gemma-3-270m-it": (268_098_176, 32768),
    "google/functiongemma-270m-it": (268_098_176, 32768),
    "google/gemma-3-1b-it": (999_885_952, 32768),
    "google/gemma-3-4b-it": (3_880_263_168, 131072),
    "Qwen/Qwen3-0.6B": (596_049_920, 40960),
    "Qwen/Qwen3-1.7B": (1_720_574_976, 40960),
    "Qwen/Qwen3-4B": (4_022_468_096, 40960),
    "Qwen/Qwen3.5-0.8B": (752_393_024, 262144),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 131072),
    "meta-llama/Llama-3.2-1B-Instruct": (1_235_814_400, 131072),
    "meta-llama/Llama-3.2-3B-Instruct": (3_212_749_824, 131072),
    "LiquidAI/LFM2-1.2B": (1_170_340_608, 128000),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 8192),
    "HuggingFaceTB/SmolLM2-360M": (361_821_120, 8192),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (361_821_120, 8192),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (1_711_376_384, 8192),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, 65536),
    "microsoft/Phi-4-mini-instruct": (3_836_021_760, 131072),
    "SakanaAI/TinySwallow-1.5B-Instruct": (1_543_714_304, 32768),
    "allenai/OLMo-2-0425-1B-Instruct": (1_484_916_736, 4096),
    "ibm-granite/granite-3.3-2b-instruct": (2_533_539_840, 131072),
    "google/gemma-2-2b-it": (2_614_341_888, 8192),
    "google/gemma-2-2b-jpn-it": (2_614_341_888, 8192),
    # With the towers, and the keys and values that no layer reads, the files have 5,123,178,051 and 7,996,156,490.
    "google/gemma-4-E2B-it": (4_628_569_379, 131072),
    "google/gemma-4-E4B-it": (7_463_013_418, 131072),
    "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, 32768),
    "Qwen/Qwen2.5-1.5B-Instruct": (1_543_714_304, 32768),
    "Qwen/Qwen3.5-4B": (4_205_751_296, 262144),
    "ibm-granite/granite-4.0-350m": (352_379_904, 32768),
    "ibm-granite/granite-4.0-1b": (1_631_750_144, 131072),
    "ibm-granite/granite-4.0-micro": (3_402_836_480, 131072),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": (1_279_391_488, 65536),
    "zai-org/GLM-4-9B-0414": (9_400_279_040, 32768),
    "mistralai/Mistral-7B-Instruct-v0.3": (7_248_023_552, 32768),
    "allenai/Olmo-3-7B-Instruct": (7_298_011_136, 65536),
    # Mistral states 3.4 billion, and 0.4 for the vision tower
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": (3_429_006_336, 262144),
}
# With the vision tower (460,730,096) and the layer that predicts more tokens (424,699,392) the files hold
# 27,781,427,952 weights: the 55.56 GB in bf16 that the hub shows.
KNOWN |= {f"Qwen/Qwen{version}-27B": (_QWEN_3_5_27B, 26_895_998_464, 262144) for version in ("3.5", "3.6", "3.8")}
KNOWN |= {name: (published_configs()[name], *figures) for name, figures in PUBLISHED.items()}


def test_every_published_config_is_held_to_its_weights() -> None:
    assert PUBLISHED.keys() == published_configs().keys()


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_of_the_hub_is_supported_and_has_its_weights(name: str) -> None:
    config, weights, context = KNOWN[name]
    assert kind_faults(config) == config_faults(config) == []
    text = text_config(config)
    assert sum(math.prod(shape) for shape in tensor_shapes(text).values()) == weights
    assert context_length(text) == context
    assert len(forward_config(text).windows) == text["num_hidden_layers"]

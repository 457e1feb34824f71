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
_SMOL: dict[str, Any] = _LLAMA_8B | {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
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
    "microsoft/Phi-4-mini-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
            "sliding_window": 262144,
            "pad_token_id": 199999,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        3_836_021_760,
        131072,
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
    "google/functiongemma-270m-it": (
        _GEMMA_3
        | {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "use_bidirectional_attention": False,
        },
        268_098_176,
        32768,
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
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        _SMOL
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_key_value_heads": 32,
            "rope_theta": 130000,
        },
        1_711_376_384,
        8192,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 65536,
            "no_rope_layer_interval": 4,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
        3_075_098_624,
        65536,
    ),
    "allenai/OLMo-2-0425-1B-Instruct": (
        {
            "architectures": ["Olmo2ForCausalLM"],
            "model_type": "olmo2",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-06,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
        1_484_916_736,
        4096,
    ),
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": (  # Mistral states 3.4 billion, and 0.4 for the vision tower
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "text_config": {
                "model_type": "ministral3",
                "head_dim": 128,
                "hidden_size": 3072,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 262144,
                "rms_norm_eps": 1e-05,
                "rope_parameters": {
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "factor": 16.0,
                    "llama_4_scaling_beta": 0.1,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 16384,
                    "rope_theta": 1000000.0,
                    "rope_type": "yarn",
                    "type": "yarn",
                },
                "sliding_window": None,
                "tie_word_embeddings": True,
                "vocab_size": 131072,
            },
        },
        3_429_006_336,
        262144,
    ),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (_QWEN_1_5B, 1_543_714_304, 32768),
    "SakanaAI/TinySwallow-1.5B-Instruct": (_QWEN_1_5B, 1_543_714_304, 32768),
    "elyza/Llama-3-ELYZA-JP-8B": (_LLAMA_8B, 8_030_261_248, 8192),
    "tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3": (_LLAMA_8B | _LLAMA_3_1, 8_030_261_248, 131072),
    "google/gemma-2-2b-jpn-it": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 256000,
        },
        2_614_341_888,
        8192,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_model_of_the_hub_is_supported_and_has_its_weights(name: str) -> None:
    config, weights, context = KNOWN[name]
    assert kind_faults(config) == config_faults(config) == []
    text = text_config(config)
    assert sum(math.prod(shape) for shape in tensor_shapes(text).values()) == weights
    assert context_length(text) == context
    assert len(forward_config(text).windows) == text["num_hidden_layers"]

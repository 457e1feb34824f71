"""What a config leaves out: transformers 5's defaults of the families, as far as a forward pass reads them."""

from typing import Any

_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_BIASES = {"attention_bias": False, "mlp_bias": False}
_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA_4 = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_k_eq_v": False,
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "head_dim": 256,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "use_double_wide_mlp": False,
}
_GRANITE = _COMMON | {
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_OLMO = _COMMON | {"rms_norm_eps": 1e-5, "attention_bias": False, "max_position_embeddings": 2048}
# By model type.
DEFAULTS: dict[str, dict[str, Any]] = {
    "exaone4": _COMMON
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma4_text": _GEMMA_4
    | {"enable_moe_block": False, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
    "gemma4_unified_text": _GEMMA_4
    | {"max_position_embeddings": 262144, "sliding_window": 1024, "use_bidirectional_attention": "vision"},
    "glm4": _COMMON
    | {
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "granite": _GRANITE | _BIASES,
    "granitemoehybrid": _GRANITE
    | {"attention_bias": False, "shared_intermediate_size": 1024, "position_embedding_type": None},
    "lfm2": {
        "tie_word_embeddings": True,
        "norm_eps": 1e-5,
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "full_attn_idxs": None,
        "layer_types": None,
    },
    "llama": _COMMON | _BIASES | {"max_position_embeddings": 2048},
    "ministral3": _COMMON
    | {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "sliding_window": None,
    },
    "mistral": _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "olmo2": _OLMO,
    "olmo3": _OLMO | {"sliding_window": 4096},
    "phi3": _COMMON
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "qwen2": _COMMON | _QWEN,
    "qwen3": _COMMON | _QWEN | {"head_dim": 128, "attention_bias": False},
    "qwen3_5_text": _COMMON
    | {
        "attention_bias": False,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
    },
    "smollm3": _COMMON
    | _BIASES
    | {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
    },
}

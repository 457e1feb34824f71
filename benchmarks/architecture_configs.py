"""Sizes of a tiny model of every architecture that transformers and mlx-lm both have: see `benchmarks.architectures`.

Constants differ from their defaults where a lost one should show in the logits.
"""

from typing import Any

# For every config class, as far as it has such a field.
SIZES: dict[str, Any] = {
    **{"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2},
    # mixtures of experts
    **{"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4},
    **{"n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "num_shared_experts": 1},
    **{"n_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"num_dense_layers": 1, "moe_layer_start_index": 1},
    # latent attention
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    # linear attention
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    # embeddings of each layer
    **{"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 16},
}
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
_SHARED: dict[str, Any] = {
    **{"num_hidden_layers": 6, "num_kv_shared_layers": 2},
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
_INDEXED: dict[str, Any] = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}
_MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32.0, "beta_slow": 1.0},
}
_WINDOW: dict[str, Any] = {"sliding_window": 24}
_CONVOLVED = ["conv", "full_attention", "conv", "full_attention"]

# What a model type needs besides.
BY_TYPE: dict[str, dict[str, Any]] = {
    name: {}
    for name in (
        *("apertus", "bitnet", "cohere", "dots1", "ernie4_5", "ernie4_5_moe", "gemma", "glm4", "glm4_moe"),
        *("granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "llama4_text", "minimax"),
        *("ministral", "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo_hybrid", "olmoe", "phi"),
        *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
        *("seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "bailing_hybrid", "minimax_m2", "mellum"),
    )
} | {
    "qwen3_moe": {"norm_topk_prob": True},  # as it is published
    **{kind: _WINDOW for kind in ("afmoe", "cohere2", "exaone4", "exaone_moe", "gpt_oss", "laguna", "olmo3")},
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 5000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT | {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT | _INDEXED,
    "falcon_h1": {
        **{"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
        "mamba_chunk_size": 16,
    },
    "falcon_mamba": {"state_size": 16},
    "gemma2": {"query_pre_attn_scalar": 20},
    "gemma3_text": {"query_pre_attn_scalar": 20},
    "gemma3n_text": _WINDOW | _SHARED | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": _WINDOW | _SHARED | {"global_head_dim": 32},
    "glm": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT | _INDEXED,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {"intermediate_size": 256},
    "gptj": _GPT | {"rotary_dim": 8},
    "granitemoehybrid": {
        **_MAMBA2,
        **{"layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2, "shared_intermediate_size": 48},
    },
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 16, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    },
    "kimi_linear": _LATENT,
    "lfm2": {"layer_types": _CONVOLVED, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONVOLVED},
    "longcat_flash": {
        **{"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "moe_topk": 2},
        "zero_expert_num": 2,
    },
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "mimo_v2_flash": _WINDOW,
    "minicpm3": _LATENT,
    "ministral3": {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16},
        **{"ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    },
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "recurrent_gemma": {"lru_width": 64, "num_key_value_heads": 1},
}

# Keys that configs on the hub have, that mlx-lm reads, and that transformers does not write.
ON_THE_HUB: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": {"sliding_window_pattern": "LLLG", "head_dim": 16},
    "exaone_moe": {"is_moe_layer": [False, True, True, True], "head_dim": 16, "sliding_window_pattern": "LLLG"},
    "falcon_h1": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"] * 2, "time_step_limit": [0.0, 1e9]},
        "position_embedding_type": "nope",  # without the key transformers turns nothing, mlx-lm every head
    },
    "jamba": {"layers_block_type": None},  # absent
    "kimi_linear": {
        "rope_theta": 10000.0,
        "linear_attn_config": {
            **{"full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 4},
            "short_conv_kernel_size": 4,
        },
    },
    "mamba2": {"intermediate_size": 128, "time_step_limit": [0.0, 1e9]},
    "mellum": {"num_experts": 4},
    "lfm2": {"block_dim": 64, "block_ff_dim": 96},
    "minimax": {"shared_intermediate_size": 0, "rotary_dim": 16},
    "minimax_m2": {"shared_intermediate_size": 0, "rotary_dim": 8},
    "nemotron_h": {"num_hidden_layers": 4, "hybrid_override_pattern": "ME*-", "time_step_limit": [0.0, 1e9]},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16},
    "solar_open": {"intermediate_size": 96, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
}

# Multimodal models, of which the text part is trained: the model type of that, and the vision tower's sizes.
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("gemma4_text", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}),
    "mistral3": ("ministral3", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}),
    "qwen2_5_vl": ("qwen2", {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
    "qwen3_5": ("qwen3_5_text", {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
    "qwen3_vl": ("qwen3", {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}),
}

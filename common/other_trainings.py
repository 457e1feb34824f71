"""Trainings other than on answers (SFT): the keys of a configuration and the calls of a script that ask for one.

Of TRL: what its other commands take and `trl sft` does not, in 1.16.0 and in older versions that had more commands.
"""

import re
from collections.abc import Mapping
from typing import Any

ANOTHER_TRAINING = "another training"
ONLY_SFT = "Twintune trains on answers (SFT); of rows with chosen answers it trains these: --field completion=chosen."
_PREFERENCE = (
    *("beta", "label_smoothing", "disable_dropout", "precompute_ref_log_probs", "precompute_ref_batch_size"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "ref_model_init_kwargs", "reference_free"),
    *("force_use_ref_model", "ref_adapter_name", "model_adapter_name", "generate_during_eval", "max_prompt_length"),
    *("max_completion_length", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "loss_weights"),
    *("ld_alpha", "rpo_alpha", "use_weighting", "desirable_weight", "undesirable_weight", "cpo_alpha", "simpo_gamma"),
)
_ONLINE = (
    *("num_generations", "reward_funcs", "reward_model_name_or_path", "reward_model_path", "reward_weights"),
    *("scale_rewards", "steps_per_generation", "num_iterations", "generation_batch_size", "epsilon_high"),
    *("mask_truncated_completions", "importance_sampling_level", "use_vllm", "log_completions", "sft_model_path"),
    *("num_ppo_epochs", "response_length", "missing_eos_penalty", "kl_coef", "rloo_k", "center_rewards_coefficient"),
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "lmbda", "seq_kd"),
)
# By program: keys of which every value but these asks for another training. An empty value never does.
_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "mlx-lm": {"train_mode": ("sft",)},  # mlx-lm-lora's, which takes mlx_lm's other keys
    "axolotl": {"rl": (False,), "reward_model": (False,), "process_reward_model": (False,)},
    "llama-factory": {"stage": ("sft",)},
    "trl": {"loss_type": ("nll", "dft", "chunked_nll"), **dict.fromkeys((*_PREFERENCE, *_ONLINE), ())},
}
_NAMES = (
    r"PO\d*|KTO|BCO|RLOO|GKD|GOLD|PRM|OPD|SDFT|NashMD|MiniLLM|Reward|Distillation"
    r"|SentenceTransformer|CrossEncoder|SparseEncoder"
)
_CALLED = re.compile(rf"(?!Patch).*(?:{_NAMES})(?:[vV]\d)?(?:Script|Training)*(?:Trainer|Config|Arguments|Args)")


def asks_for_another(tool: str, values: Mapping[str, Any]) -> str | None:
    """The key of a configuration by which it is for another training."""
    for key, value in values.items():
        of_sft = _VALUES.get(tool, {}).get(key)
        if of_sft is not None and value not in (None, "", *of_sft):
            return key
    return None


def is_of_another(name: str) -> bool:
    """Whether a script that calls this trains otherwise."""
    return bool(_CALLED.fullmatch(name))

"""Names of options in mlx_lm.lora, TRL, PEFT and Axolotl, and what becomes of each."""

# One name for another, same meaning.
SAME = {
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "lora_r": "rank",
    "lora_target": "targets",
    "val_size": "valid_share",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "target_modules": "targets",
    "num_train_epochs": "epochs",
    "early_stopping_patience": "patience",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "lr": "learning_rate",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "steps_per_eval": "eval_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "output_dir": "output",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset_name": "data",
    "val_set_size": "valid_share",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "epsilon",
    "gradient_clipping": "max_grad_norm",
    "resume_from_checkpoint": "resume",
    "grad_checkpoint": "gradient_checkpointing",
    "fine_tune_type": "method",
    "finetuning_type": "method",
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "loraplus_lr_ratio": "lora_plus",
    "chat_template_path": "chat_template",
    "hub_model_id": "push",
    "wandb_project": "track_project",
    "swanlab_project": "track_project",
    "mlflow_experiment_name": "track_project",
    "project_name": "track_project",
}

# Known elsewhere, meaning something else here. The value is what to do instead.
EXPLAINED = {
    "lr_schedule": "mlx_lm's list of function and arguments; use schedule, learning_rate and warmup",
    "adapter_path": "mlx_lm's folder for adapters alone; use output for the complete run folder",
    "packing": "rows of like length are computed together without packing, so there is nothing to turn on",
    "sample_packing": "rows of like length are computed together without packing, so there is nothing to turn on",
    "fp16": "float16 overflows in Gemma-3 and is very slow on CPUs; use precision: bf16 or fp32",
    "datasets": "Axolotl's list; use data with files or folders",
    "auto_find_batch_size": "a step that runs out of memory is split into smaller micro-batches by itself",
    **dict.fromkeys(("eos_token", "pad_token"), "the model's own tokenizer and template say how a turn ends"),
    "push_to_hub": "use push with owner/name",
    "trust_remote_code": "code that comes with a model is never run; the model must be of a supported family",
}

_RECORDED = "every step is shown and written to metrics.jsonl in the run folder"
_RUN_FOLDER = "the run folder, which output names, holds the logs and names the run"
_ATTENTION = "the fastest exact attention of the device is used"
_LOADING = "rows are encoded before training, and large files are mapped into memory"
# What changes nothing that Twintune would do otherwise, and why.
NEEDLESS = {
    **dict.fromkeys(("steps_per_report", "logging_steps", "logging_strategy", "logging_first_step"), _RECORDED),
    **dict.fromkeys(("logging_dir", "run_name", "wandb_name"), _RUN_FOLDER),
    "wandb_entity": "the variable WANDB_ENTITY names it",
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation", "xformers_attention"), _ATTENTION),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "remove_unused_columns"), _LOADING),
    "val_batches": "validation scores up to eval_rows rows",
    "eval_strategy": "validation runs four times an epoch, or every eval_every steps",
    "evaluation_strategy": "validation runs four times an epoch, or every eval_every steps",
    "save_strategy": "checkpoints are written at the end of each epoch, or every save_every steps",
    "per_device_eval_batch_size": "validation rows are cut into micro-batches that fit memory",
    "eval_batch_size": "validation rows are cut into micro-batches that fit memory",
    "group_by_length": "rows of like length are computed together within each step",
    "pad_to_sequence_len": "padding is added only where attention needs it",
    "tf32": "float32 is computed as float32; bf16 is the fast type",
    "use_liger_kernel": "the loss never holds all logits, which is what saves memory there",
    "liger_kernel": "the loss never holds all logits, which is what saves memory there",
    "gradient_checkpointing_kwargs": "checkpointing is exact in every setting",
    "overwrite_output_dir": "a run folder is never overwritten",
    **dict.fromkeys(
        (
            "preprocessing_num_workers",
            "overwrite_cache",
            "dataset_prepared_path",
            "dataset_num_proc",
            "low_cpu_mem_usage",
        ),
        "rows are encoded once and kept in the cache",
    ),
    **dict.fromkeys(("plot_loss", "include_num_input_tokens_seen"), "report.html has the curves"),
    **dict.fromkeys(("wandb_watch", "wandb_log_model", "wandb_run_id"), "--track-artifacts sends the adapter"),
    **dict.fromkeys(("model_type", "tokenizer_type", "is_llama_derived_model"), "the model's config names them"),
    **dict.fromkeys(("ddp_timeout", "save_safetensors", "save_only_model", "strict"), "nothing here depends on it"),
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch"), "validation and checkpoints have intervals that fit"),
    **dict.fromkeys(("eval_sample_packing", "neat_packing", "eval_packing"), "sequences are not concatenated"),
    "loftq_config": "the adapter starts as LoRA's authors say",
    "lora_fan_in_fan_out": "the families here have no such layers",
    "fan_in_fan_out": "the families here have no such layers",
    "clear_cache_threshold": "the cache's limit is chosen by the plan",
    "do_train": "training is what the command does",
    "do_eval": "validation runs wherever there are validation rows",
}

# Settings that ask for what Twintune does anyway; any other value of theirs is a fault.
AGREED: dict[str, tuple[object, ...]] = {
    "train": (True, "true"),
    "optimizer": ("adamw", "adamw_torch", "adamw_torch_fused"),
    "optim": ("adamw", "adamw_torch", "adamw_torch_fused"),
    "mask_prompt": (True, "true"),
    "assistant_only_loss": (True, "true"),
    "completion_only_loss": (True, "true"),
    "load_best_model_at_end": (True, "true"),
    "metric_for_best_model": ("loss", "eval_loss"),
    "greater_is_better": (False, "false"),
    "loss_type": ("nll", "chunked_nll"),
    "train_mode": ("sft",),
    **dict.fromkeys(("rl", "reward_model", "process_reward_model"), (False, "false")),
    "lora_bias": ("none",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "lora_task_type": ("CAUSAL_LM",),
}
# AdamW with its state in 8 bits or paged: the state of an adapter is small, so it is kept in float32.
SMALLER_ADAMW = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit")
TYPES = {"bfloat16": "bf16", "bf16": "bf16", "float32": "fp32", "fp32": "fp32", "auto": "auto"}

# Switches of others that are a value of one of our options; off, they say nothing.
SWITCHES = {
    "load_in_4bit": ("quantization", "4bit"),
    "load_in_8bit": ("quantization", "8bit"),
    "use_dora": ("method", "dora"),
    "peft_use_dora": ("method", "dora"),
    "lora_target_linear": ("targets", "all-linear"),
    "train_on_inputs": ("train_on", "all"),
}
# Axolotl's `adapter` names a method; ours a folder.
AXOLOTL_ADAPTERS: dict[str, dict[str, str]] = {"lora": {}, "qlora": {"quantization": "4bit"}}

# What asks for a tracker besides `report_to`, and which.
TRACKED = {
    "use_wandb": "wandb",
    "wandb_project": "wandb",
    "use_mlflow": "mlflow",
    "use_tensorboard": "tensorboard",
    "use_swanlab": "swanlab",
    "use_trackio": "trackio",
}

# Options of other programs that mean something only together.
FAMILIES = (
    ("iters", "batch_size", "grad_accumulation_steps"),
    ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
)

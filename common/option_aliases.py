"""Spellings of mlx_lm.lora, TRL and Axolotl: translated where they mean the same, explained where they do not."""

from typing import Any

# One name for another, same meaning.
SAME = {
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "targets",
    "target_modules": "targets",
    "num_train_epochs": "epochs",
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
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "loraplus_lr_ratio": "lora_plus",
}

# Known elsewhere, meaning something else here. The value is what to do instead.
EXPLAINED = {
    "lr_schedule": "mlx_lm's list of function and arguments; use schedule, learning_rate and warmup",
    "adapter_path": "mlx_lm's folder for adapters alone; use output for the whole run folder",
    "packing": "rows of like length are computed together without packing, so there is nothing to turn on",
    "sample_packing": "rows of like length are computed together without packing, so there is nothing to turn on",
    "fp16": "float16 overflows in Gemma-3 and crawls on CPUs; use precision: bf16 or fp32",
    "datasets": "Axolotl's list; use data with one file or folder",
    "auto_find_batch_size": "a step that runs out of memory is cut finer by itself",
}

# What changes nothing that Twintune would do otherwise.
NEEDLESS = {
    "steps_per_report": "every step is shown and written to metrics.jsonl",
    "logging_steps": "every step is shown and written to metrics.jsonl",
    "val_batches": "validation goes over every validation row",
}

# Settings that ask for what Twintune does anyway; any other value of theirs is a fault.
AGREED: dict[str, tuple[object, ...]] = {
    "train": (True, "true"),
    "optimizer": ("adamw", "adamw_torch", "adamw_torch_fused"),
    "optim": ("adamw", "adamw_torch", "adamw_torch_fused"),
    "mask_prompt": (True, "true"),
    "assistant_only_loss": (True, "true"),
    "completion_only_loss": (True, "true"),
}

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
_AXOLOTL_ADAPTERS = {"lora": {}, "qlora": {"quantization": "4bit"}}

# Options of other programs that mean something only together.
FAMILIES = (
    ("iters", "batch_size", "grad_accumulation_steps"),
    ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
)
_WARMUPS = {"warmup", "warmup_steps", "warmup_ratio"}
_TRL_BATCH = 8  # TrainingArguments.per_device_train_batch_size
_MLX_BATCH = 4  # mlx_lm.lora's batch_size


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """`(options, notes, faults)`: foreign spellings replaced, a note for each, a fault for what cannot be."""
    rest = dict(values)
    notes: list[str] = []
    faults: list[str] = []
    options = _batches(rest, notes, faults)
    _lora_parameters(rest, options, notes, faults)
    for key in list(rest):
        if key == "num_layers":
            count = str(rest.pop(key))
            if count != "-1":
                options["layers"] = f"last:{count}"
            notes.append(
                f"num_layers {count} -> " + ("every layer, as here" if count == "-1" else f"layers last:{count}")
            )
        elif key == "adapter" and rest[key] in _AXOLOTL_ADAPTERS:
            meant = _AXOLOTL_ADAPTERS[rest.pop(key)]
            options |= {name: value for name, value in meant.items() if "load_in_4bit" not in rest}
            notes.append(f"adapter: Axolotl's name of a method -> {meant or 'method lora, as here'}")
        elif key in SWITCHES:
            name, value = SWITCHES[key]
            if str(rest.pop(key)).lower() not in ("false", "none"):
                options[name] = value
                notes.append(f"{key} -> {name} {value}")
            else:
                notes.append(f"{key}: off, as it is here")
        elif key in EXPLAINED and str(rest[key]).lower() in ("false", "none"):
            del rest[key]
            notes.append(f"{key}: off, as it is here")
        elif key in EXPLAINED:
            faults.append(f"{key}: {EXPLAINED[key]}")
            del rest[key]
        elif key == "max_steps" and str(rest[key]) == "-1":
            del rest[key]
            notes.append("max_steps -1: the epochs count, as here without steps")
        elif key in NEEDLESS:
            del rest[key]
            notes.append(f"{key}: not needed, {NEEDLESS[key]}")
        elif key in AGREED:
            if rest[key] in AGREED[key]:
                notes.append(f"{key}: that is what Twintune does")
            else:
                faults.append(f"{key}: {rest[key]!r} is not offered, only {AGREED[key][0]!r}")
            del rest[key]
        elif key == "bf16":
            options["precision"] = {"true": "bf16", "false": "fp32"}.get(str(rest.pop(key)).lower(), "auto")
            notes.append(f"bf16 -> precision {options['precision']}")
        elif key in SAME:
            _rename(rest, options, key, notes, faults)
    for key in rest.keys() & options.keys():
        faults.append(f"{key} is given twice, once under another name")
    return {**options, **rest}, notes, faults


def _rename(rest: dict[str, Any], options: dict[str, Any], key: str, notes: list[str], faults: list[str]) -> None:
    name, value = SAME[key], rest.pop(key)
    if name in options:
        faults.append(f"{key} means {name}, which is given already")
        return
    number = _number(value)
    if name == "schedule" and value == "constant_with_warmup":
        value = "constant"  # ours has the warm-up that `warmup` says
    elif name == "schedule" and value == "constant" and not _WARMUPS & {*options, *rest}:
        options["warmup"] = 0
        notes.append(f"{key} constant has no warm-up -> warmup 0")
    if key == "warmup_ratio" and number is not None and number >= 1:
        faults.append(f"warmup_ratio: must be below 1 (got {value!r})")
    elif key == "val_set_size" and number is not None and number >= 1:
        faults.append(f"val_set_size: Axolotl's count of rows; valid_share takes a share below 1 (got {value!r})")
    else:
        options[name] = value
        notes.append(f"{key} -> {name} {value}")


def _batches(rest: dict[str, Any], notes: list[str], faults: list[str]) -> dict[str, Any]:
    """What means the same only together: rows a micro-batch, accumulation, and counts of micro-batches."""
    options: dict[str, Any] = {}
    micro_key = next((k for k in ("per_device_train_batch_size", "micro_batch_size") if k in rest), None)
    if "iters" in rest or "grad_accumulation_steps" in rest:  # mlx_lm.lora counts micro-batches
        parts = {
            "iters": rest.pop("iters", None),
            "batch_size": rest.pop("batch_size", _MLX_BATCH),
            "grad_accumulation_steps": rest.pop("grad_accumulation_steps", 1),
        }
        numbers = _whole_numbers({name: value for name, value in parts.items() if value is not None}, faults)
        if numbers is None:
            return options
        accumulate = numbers["grad_accumulation_steps"]
        options["batch_size"] = numbers["batch_size"] * accumulate
        said = f"batch_size {numbers['batch_size']} x grad_accumulation_steps {accumulate}"
        notes.append(f"mlx_lm's {said} -> batch_size {options['batch_size']} rows a step")
        if "iters" in numbers:
            options["steps"] = max(1, numbers["iters"] // accumulate)
            notes.append(f"mlx_lm's iters {numbers['iters']} micro-batches -> steps {options['steps']}")
        for key, name in (("steps_per_eval", "eval_every"), ("save_every", "save_every")):
            every = _number(rest.get(key)) if accumulate > 1 else None
            if every is not None and every >= 1:
                del rest[key]
                options[name] = max(1, int(every) // accumulate)
                notes.append(f"mlx_lm's {key} {every:g} micro-batches -> {name} {options[name]}")
    elif micro_key or "gradient_accumulation_steps" in rest:  # TRL and Axolotl
        if "batch_size" in rest:
            name = micro_key or "gradient_accumulation_steps"
            faults.append(
                f"{name} beside batch_size: batch_size is all rows of an optimizer step; "
                "give either batch_size, or micro batch and accumulation"
            )
            rest.pop("gradient_accumulation_steps", None)
            rest.pop(micro_key or "", None)
            return options
        micro_name = micro_key or "per_device_train_batch_size"
        parts = {
            micro_name: rest.pop(micro_name, _TRL_BATCH),
            "gradient_accumulation_steps": rest.pop("gradient_accumulation_steps", 1),
        }
        numbers = _whole_numbers(parts, faults)
        if numbers is not None:
            accumulate = numbers["gradient_accumulation_steps"]
            options["batch_size"] = numbers[micro_name] * accumulate
            said = f"{micro_name} {numbers[micro_name]} x gradient_accumulation_steps {accumulate}"
            notes.append(f"{said} -> batch_size {options['batch_size']} rows a step")
    return options


def _lora_parameters(rest: dict[str, Any], options: dict[str, Any], notes: list[str], faults: list[str]) -> None:
    """mlx_lm's `lora_parameters: {rank, scale, dropout, keys}`; its scale multiplies, ours is alpha / rank."""
    nested = rest.pop("lora_parameters", None)
    nested = dict(nested) if isinstance(nested, dict) else {}
    for key in [key for key in rest if key.startswith("lora_parameters.")]:
        nested[key.removeprefix("lora_parameters.")] = rest.pop(key)
    if not nested:
        return
    for key in nested.keys() - {"rank", "scale", "dropout", "keys"}:
        faults.append(f"lora_parameters.{key}: unknown; mlx_lm has rank, scale, dropout, keys")
    if "rank" in nested and "rank" in rest:
        faults.append("rank is given twice, once under another name")
        return
    rank = _number(nested.get("rank", rest.get("rank", 8)))
    scale = _number(nested.get("scale", 20.0))
    if rank is None or scale is None:
        faults.append("lora_parameters: rank and scale must be numbers")
        return
    options["rank"] = rest.pop("rank", None) or int(rank)
    options["alpha"] = scale * rank
    notes.append(f"lora_parameters.scale {scale:g} with rank {rank:g} -> alpha {scale * rank:g}")
    if "dropout" in nested:
        options["dropout"] = nested["dropout"]
    if "keys" in nested:
        keys = nested["keys"]
        if not isinstance(keys, list) or not keys:
            faults.append(f"lora_parameters.keys: must be a list of layer names (got {keys!r})")
            return
        options["targets"] = [str(name).rsplit(".", 1)[-1] for name in keys]
        notes.append(f"lora_parameters.keys -> targets {' '.join(options['targets'])}")


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _whole_numbers(values: dict[str, Any], faults: list[str]) -> dict[str, int] | None:
    numbers: dict[str, int] = {}
    for name, value in values.items():
        number = _number(value)
        if number is None or number < 1 or number != int(number):
            faults.append(f"{name}: must be a whole number from 1 up (got {value!r})")
        else:
            numbers[name] = int(number)
    return numbers if len(numbers) == len(values) else None

"""What each program's configuration means: its defaults, and the keys that are more than another name."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config_values import short
from common.goals import Setting
from common.other_configs import dataset_files
from common.other_data import rows_of
from common.other_scripts import RESPONSES_ONLY, TRANSFORMERS

NAMES = {
    "mlx-lm": "mlx_lm.lora",
    "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory",
    "trl": "TRL",
    "unsloth": "Unsloth",
}
_TRAINER = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3,
    "max_grad_norm": 1.0,
    "seed": 42,
}
_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "weight_decay": 0.0}
_UNSLOTH = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "max_seq_length": 2048, "load_in_4bit": True}
# What a program takes for a key that its file leaves out, where that is not Twintune's own default.
# Read in mlx-lm 0.32, axolotl 0.19.0, llamafactory 0.9.5, trl 1.16.0, unsloth 2026.10.9, transformers 5.24.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlx-lm": {
        **{"iters": 1000, "batch_size": 4, "learning_rate": 1e-5, "num_layers": 16, "max_seq_length": 2048, "seed": 0},
        **{"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, "steps_per_eval": 200, "val_batches": 25},
    },
    "axolotl": {
        **{"lr_scheduler": "cosine", "val_set_size": 0.0, "warmup_ratio": 0.03, "max_grad_norm": 1.0, "seed": 42},
        **{"num_epochs": 1, "micro_batch_size": 1, "sequence_len": 512},
    },
    "llama-factory": {
        **_TRAINER,
        **_BATCH,
        **{"cutoff_len": 2048, "lora_rank": 8, "lora_target": "all", "val_size": 0.0, "warmup_steps": 0},
    },
    "trl": {
        **_TRAINER,
        **_BATCH,
        **{"learning_rate": 2e-5, "max_length": 1024, "warmup_steps": 0, "lora_r": 16, "lora_alpha": 32},
        "lora_dropout": 0.05,
    },
    # what Unsloth makes of TRL's SFTConfig
    "unsloth": {
        **_TRAINER,
        **_UNSLOTH,
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.001},
        **{"warmup_steps": 0.1, "seed": 3407},
    },
}
_UNSLOTH_TRANSFORMERS = {**_TRAINER, **_BATCH, **_UNSLOTH, "warmup_steps": 0}


@dataclass
class Migration:
    """One under way. values: keys still to be translated; settings: what they became; left: what became of the rest."""

    values: dict[str, Any]
    given: frozenset[str]  # keys of the file
    computed: frozenset[str] = frozenset()  # keys of a script that are no literals; ** for those that are not known
    settings: list[Setting] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    beware: list[str] = field(default_factory=list)

    def drop(self, key: str, why: str) -> None:
        if key in self.values:
            self.left.append(f"{key} {short(self.values.pop(key))}: {why}")

    def put(self, name: str, value: Any, why: str) -> None:
        self.settings.append(Setting(name, value, why))


def defaults(tool: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the program; of a script for Unsloth those of the class that it calls, whose key leaves `values`."""
    return _UNSLOTH_TRANSFORMERS if values.pop(TRANSFORMERS, False) and tool == "unsloth" else DEFAULTS[tool]


def _mlx_lm(work: Migration, path: Path) -> None:
    values = work.values
    if values.get("lora_layers") is not None and "num_layers" not in values:
        values["num_layers"] = values.pop("lora_layers")
    if not values.pop("mask_prompt", False):
        work.put("train_on", "all", "mask_prompt is off: mlx_lm trains on prompts too. assistant is usually better")
    _mlx_optimizer(work)
    batches, batch = values.pop("val_batches"), values.get("batch_size")
    if isinstance(batches, int) and isinstance(batch, int):
        rows = 0 if batches < 0 else batches * batch
        work.put("eval_rows", rows, f"val_batches {batches} x batch_size {batch} rows")
    _mlx_schedule(work)
    work.put("max_grad_norm", 0.0, "mlx_lm clips no gradients")
    if "adapter_path" in values:
        adapters = values.pop("adapter_path")
        work.put("output", adapters, f"adapter_path {short(adapters)}: here the complete run folder, which must be new")
    for key in ("test", "test_batches"):
        work.drop(key, "a test file in the data folder is scored at the end")
    values.pop("config", None)


def _mlx_optimizer(work: Migration) -> None:
    """mlx_lm's `optimizer`, with the arguments in `optimizer_config: {name: {...}}`."""
    name = str(work.values.get("optimizer", "adam"))
    configs = work.values.pop("optimizer_config", None)
    config = configs.get(name) if isinstance(configs, dict) else None
    config = {**config} if isinstance(config, dict) else {}
    if name == "adam":
        work.values.pop("optimizer", None)
        work.put("weight_decay", 0.0, "optimizer adam: AdamW without weight decay; mlx_lm's corrects no bias at first")
    if name == "adamw":
        work.put("weight_decay", config.pop("weight_decay", 0.01), "optimizer adamw; MLX's has 0.01 by default")
    if name in ("adam", "adamw"):
        betas = config.pop("betas", None)
        given = dict(zip(("beta1", "beta2"), betas, strict=False)) if isinstance(betas, list) else {}
        given |= {"epsilon": config.pop("eps")} if "eps" in config else {}
        for option, value in given.items():
            work.put(option, value, f"optimizer_config's of {name}")
        config.pop("bias_correction", None)
    work.left += [
        f"optimizer_config, {name}: {short(key)} {short(value)}: not offered" for key, value in config.items()
    ]


def _mlx_schedule(work: Migration) -> None:
    """mlx_lm's `lr_schedule: {name, warmup, arguments}`, counted in its micro-batches."""
    given = work.values.pop("lr_schedule", None)
    if not isinstance(given, dict):
        work.put("schedule", "constant", "mlx_lm's rate is constant without lr_schedule")
        work.put("warmup", 0, "and has no warm-up")
        return
    names = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    name = str(given.get("name"))
    if name not in names:
        work.left.append(f"lr_schedule {short(given)}: not offered; schedule is cosine, linear or constant")
        return
    arguments = given.get("arguments")
    rates = arguments if isinstance(arguments, list) else []
    if rates:  # it counts, and not mlx_lm's default
        work.values["learning_rate"] = rates[0]
        work.beware = [line for line in work.beware if not line.startswith("learning_rate ")]
    if len(rates) > 1 and name == "linear_schedule" and _rises(rates[0], rates[1]):
        work.values["learning_rate"] = rates[1]
        work.put("schedule", "constant", "not lr_schedule's rise, which is not offered but as warmup; its last rate")
    else:
        work.put("schedule", names[name], f"lr_schedule {name}; here it always ends near 0")
    accumulate = work.values.get("grad_accumulation_steps") or 1
    warmup, steps = given.get("warmup") or 0, 1
    if isinstance(warmup, int) and isinstance(accumulate, int):
        steps = math.ceil(warmup / accumulate)
    work.put("warmup", steps, f"lr_schedule's warmup {short(warmup)}, in optimizer steps")


def _rises(first: Any, last: Any) -> bool:
    return isinstance(first, int | float) and isinstance(last, int | float) and first < last


def _axolotl(work: Migration, path: Path) -> None:
    values = work.values
    _datasets(work, path)
    work.drop("test_datasets", "rows for validation: a folder with train.jsonl and valid.jsonl under data has both")
    work.drop("pretraining_dataset", "plain texts, read as a stream: write them as rows with text, and give the file")
    if not values.get("adapter"):
        values.pop("adapter", None)
        work.put("method", "full", "no adapter: Axolotl trains every weight")
    if values.get("sample_packing"):
        work.beware.append("sample_packing: a row there is several packed ones, so batch_size counts fewer rows here")
    if values.get("chat_template") not in (None, "chatml", "gemma", "llama3"):
        work.drop("chat_template", "the model's own template is used; check-data --explain 1 shows it")
    if not values.get("train_on_inputs", False):
        values.pop("train_on_inputs", None)


def _datasets(work: Migration, path: Path) -> None:
    """The list of Axolotl, which TRL takes too."""
    datasets = work.values.pop("datasets", None)
    if datasets is None:
        return
    rows = rows_of(datasets, path.parent)
    work.left += rows.left
    if rows.sources:
        kinds = ", ".join(map(short, dict.fromkeys(rows.kinds)))
        what = f"their types ({kinds})" if kinds else "their formats"
        work.put("data", rows.sources, f"datasets' paths; {what} are recognized by the columns: check-data shows it")
        work.drop("dataset_name", "datasets count there")


def _llama_factory(work: Migration, path: Path) -> None:
    values = work.values
    values.pop("stage", None)
    found = dataset_files(values, path.parent)
    if found.sources:
        work.put("data", found.sources, f"dataset {short(values['dataset'])}, by dataset_info.json")
        if found.fields:
            work.put("field", found.fields, "the columns that dataset_info.json names")
        work.left += found.left
        values.pop("dataset")
        values.pop("dataset_dir", None)
    work.drop("dataset", "a name in dataset_info.json, which is not beside the file; give the rows under data")
    work.drop("dataset_dir", "give files or folders under data")
    work.drop("template", "the model's own template is used; check-data --explain 1 shows it")
    if values.get("lora_target") == "all":
        values.pop("lora_target")
        work.put("targets", ["all-linear"], "lora_target all")
    rank = next((values[key] for key in ("lora_rank", "lora_r", "r") if key in values), None)
    if "lora_alpha" not in values and isinstance(rank, int):
        values["lora_alpha"] = 2 * rank
        work.beware.append("lora_alpha is not in the file: LLaMA-Factory takes twice the rank")
    bits = values.pop("quantization_bit", None)
    if bits is not None:
        work.put("quantization", f"{bits}bit", f"quantization_bit {bits}")
    if values.pop("train_on_prompt", False):
        work.put("train_on", "all", "train_on_prompt")
    if values.pop("mask_history", False):
        work.put("train_on", "last", "mask_history: only the last turn")
    if values.pop("pure_bf16", False):
        values["bf16"] = True


def _trl(work: Migration, path: Path) -> None:
    values = work.values
    if not values.pop("use_peft", False):
        work.put("method", "full", "without use_peft TRL trains every weight; lora needs far less memory")
        for key in [key for key in values if key.startswith("lora_")]:
            if key in work.given:
                work.drop(key, "use_peft is not on")
            else:
                del values[key]
    elif "lora_target_modules" not in values:
        work.beware.append(
            "lora_target_modules is not in the file: PEFT chooses by model, often q_proj and v_proj alone"
        )
    _datasets(work, path)
    _no_validation(work)
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    if not values.get("assistant_only_loss") and not values.get("completion_only_loss"):
        values.pop("assistant_only_loss", None)
        work.beware.append(
            "TRL trains on every turn of a conversation; here on the assistant's. As there: train_on: all"
        )


def _no_validation(work: Migration) -> None:
    if (work.computed - work.given) & {"eval_strategy", "evaluation_strategy"}:
        work.beware.append("eval_strategy is computed in the script: if nothing is validated there, valid_share: 0")
        return
    asked = work.values.get("eval_strategy", work.values.get("evaluation_strategy", "no"))
    if str(asked).lower() in ("no", "false"):
        why = "nothing is validated there. 0.1 would keep a tenth of the rows, and the best adapter would be exported"
        work.put("valid_share", 0.0, why)


def _unsloth(work: Migration, path: Path) -> None:
    values = work.values
    model = values.pop("model_name", None)
    if model is not None:
        base = str(model).removesuffix("-bnb-4bit").removesuffix("-unsloth")
        work.put(
            "model",
            base,
            f"model_name {short(model)}" + ("; quantized here from the 16-bit model" if base != model else ""),
        )
    state = values.pop("random_state", None)
    if state is not None and "seed" not in values:
        work.put("seed", state, f"random_state {short(state)}")
    if "use_gradient_checkpointing" in values:
        asked = values.pop("use_gradient_checkpointing")
        work.put("gradient_checkpointing", bool(asked), f"use_gradient_checkpointing {short(asked)}")
    if "max_length" in values and "max_seq_length" in values:
        work.drop("max_seq_length", "max_length of the trainer is what cuts rows")
    _no_validation(work)
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype") or "auto"
    if values.pop("full_finetuning", False):
        work.put("method", "full", "full_finetuning")
        for key in ("load_in_4bit", "load_in_8bit"):
            if key in work.given:
                work.drop(key, "full_finetuning: Unsloth turns it off")
            else:
                values.pop(key, None)
    if not values.pop(RESPONSES_ONLY, False):
        work.put("train_on", "all", "the script does not call train_on_responses_only. assistant is usually better")
    work.beware.append("the rows are made by code in the script: write them to a file, and name it under data")


READERS: dict[str, Callable[[Migration, Path], None]] = {
    "mlx-lm": _mlx_lm,
    "axolotl": _axolotl,
    "llama-factory": _llama_factory,
    "trl": _trl,
    "unsloth": _unsloth,
}

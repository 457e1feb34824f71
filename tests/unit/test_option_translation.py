"""Spellings of mlx_lm.lora, TRL and Axolotl, each with the line that says what became of it."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.option_aliases import EXPLAINED, SAME
from common.option_sources import load_options
from common.option_translation import translate
from common.options import Options


@pytest.mark.parametrize(
    ("given", "options", "note"),
    [
        ({"max_seq_length": 512}, {"max_length": 512}, "max_seq_length -> max_length 512"),
        ({"sequence_len": 512}, {"max_length": 512}, "sequence_len -> max_length 512"),
        ({"lora_r": 8}, {"rank": 8}, "lora_r -> rank 8"),
        ({"lora_alpha": 16}, {"alpha": 16}, "lora_alpha -> alpha 16"),
        ({"lora_dropout": 0.1}, {"dropout": 0.1}, "lora_dropout -> dropout 0.1"),
        ({"lora_target_modules": "q_proj"}, {"targets": "q_proj"}, "lora_target_modules -> targets q_proj"),
        ({"num_train_epochs": 2}, {"epochs": 2}, "num_train_epochs -> epochs 2"),
        ({"num_epochs": 2}, {"epochs": 2}, "num_epochs -> epochs 2"),
        ({"max_steps": 9}, {"steps": 9}, "max_steps -> steps 9"),
        ({"warmup_ratio": 0.1}, {"warmup": 0.1}, "warmup_ratio -> warmup 0.1"),
        ({"warmup_steps": 10}, {"warmup": 10}, "warmup_steps -> warmup 10"),
        ({"lr_scheduler_type": "linear"}, {"schedule": "linear"}, "lr_scheduler_type -> schedule linear"),
        ({"lr_scheduler": "cosine"}, {"schedule": "cosine"}, "lr_scheduler -> schedule cosine"),
        ({"steps_per_eval": 20}, {"eval_every": 20}, "steps_per_eval -> eval_every 20"),
        ({"eval_steps": 20}, {"eval_every": 20}, "eval_steps -> eval_every 20"),
        ({"save_steps": 20}, {"save_every": 20}, "save_steps -> save_every 20"),
        ({"output_dir": "o"}, {"output": "o"}, "output_dir -> output o"),
        ({"base_model": "a/b"}, {"model": "a/b"}, "base_model -> model a/b"),
        ({"val_set_size": 0.2}, {"valid_share": 0.2}, "val_set_size -> valid_share 0.2"),
        ({"adam_beta2": 0.95}, {"beta2": 0.95}, "adam_beta2 -> beta2 0.95"),
        ({"bf16": True}, {"precision": "bf16"}, "bf16 -> precision bf16"),
        ({"bf16": False}, {"precision": "fp32"}, "bf16 -> precision fp32"),
        ({"bf16": "auto"}, {"precision": "auto"}, "bf16 -> precision auto"),
        ({"lora_target_linear": True}, {"targets": "all-linear"}, "lora_target_linear -> targets all-linear"),
        ({"report_to": "wandb"}, {"track": ["wandb"]}, "report_to -> track wandb"),
        ({"report_to": ["mlflow", "wandb"]}, {"track": ["mlflow", "wandb"]}, "report_to -> track mlflow wandb"),
        ({"report_to": "none"}, {}, "report_to: no tracker, as it is here"),
        ({"wandb_project": None}, {}, "wandb_project: not needed, there is no tracker"),
        ({"use_swanlab": True}, {"track": ["swanlab"]}, "use_swanlab -> track swanlab"),
        ({"mask_prompt": True}, {}, "mask_prompt: that is what Twintune does"),
        ({"optim": "adamw_torch"}, {}, "optim: that is what Twintune does"),
    ],
)
def test_one_name_for_another(given: dict[str, Any], options: dict[str, Any], note: str) -> None:
    assert translate(given) == (options, [note], [])


def test_axolotls_project_names_its_tracker() -> None:
    options, notes, faults = translate({"wandb_project": "mine", "wandb_entity": None})
    assert (options, faults) == ({"track": ["wandb"], "track_project": "mine"}, [])
    assert notes[:2] == ["wandb_project -> track wandb", "wandb_project -> track_project mine"]
    assert translate({"wandb_project": "mine", "report_to": "none"})[0] == {}


@pytest.mark.parametrize("name", ["all", "comet_ml", True])
def test_a_tracker_that_is_not_offered(name: Any) -> None:
    offered = "tensorboard, wandb, mlflow, trackio, swanlab and none"
    assert translate({"report_to": name})[2] == [f"report_to: {str(name)!r} is not offered, only {offered}"]


def test_every_translation_leads_to_an_option() -> None:
    assert set(SAME.values()) <= set(Options.model_fields)
    assert not (set(SAME) | set(EXPLAINED)) & set(Options.model_fields)


def test_twintunes_own_names_pass_without_a_word() -> None:
    assert translate({"rank": 8, "steps": 3}) == ({"rank": 8, "steps": 3}, [], [])


# --- what means the same only together


def test_mlx_lm_counts_micro_batches() -> None:
    options, notes, faults = translate({"iters": 600, "batch_size": 2, "grad_accumulation_steps": 4})
    assert (options, faults) == ({"batch_size": 8, "steps": 150}, [])
    assert notes == [
        "mlx_lm's batch_size 2 x grad_accumulation_steps 4 -> batch_size 8 rows a step",
        "mlx_lm's iters 600 micro-batches -> steps 150",
    ]


def test_mlx_lms_iters_alone_mean_its_own_default_batch() -> None:
    assert translate({"iters": 600})[0] == {"batch_size": 4, "steps": 600}


def test_mlx_lms_intervals_count_micro_batches_too() -> None:
    given = {"iters": 600, "batch_size": 2, "grad_accumulation_steps": 4, "steps_per_eval": 200, "save_every": 100}
    options = translate(given)[0]
    assert (options["eval_every"], options["save_every"]) == (50, 25)


def test_trls_batch_needs_its_accumulation() -> None:
    options, notes, faults = translate({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8})
    assert (options, faults) == ({"batch_size": 16}, [])
    assert notes == ["per_device_train_batch_size 2 x gradient_accumulation_steps 8 -> batch_size 16 rows a step"]


def test_trls_batch_alone_is_not_accumulated() -> None:
    assert translate({"per_device_train_batch_size": 2})[0] == {"batch_size": 2}


def test_trls_accumulation_alone_means_its_own_default_batch() -> None:
    assert translate({"gradient_accumulation_steps": 4})[0] == {"batch_size": 32}


def test_axolotls_micro_batch_and_accumulation() -> None:
    options, notes, faults = translate({"micro_batch_size": 2, "gradient_accumulation_steps": 4})
    assert (options, faults) == ({"batch_size": 8}, [])
    assert notes == ["micro_batch_size 2 x gradient_accumulation_steps 4 -> batch_size 8 rows a step"]


def test_a_micro_batch_beside_the_whole_batch_is_refused() -> None:
    _, _, faults = translate({"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 4})
    assert len(faults) == 1
    assert faults[0].startswith("micro_batch_size beside batch_size: batch_size is all rows of an optimizer step")


@pytest.mark.parametrize("value", [0, -1, "two", 1.5])
def test_a_count_that_is_no_whole_number(value: object) -> None:
    assert translate({"iters": value})[2] == [f"iters: must be a whole number from 1 up (got {value!r})"]


def test_what_belongs_together_may_come_from_yaml_and_flags(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: x.jsonl\nper_device_train_batch_size: 2\n")
    options, _ = load_options({"config": str(config), "gradient_accumulation_steps": "4"})
    assert options.batch_size == 8


# --- mlx_lm's lora_parameters


def test_mlx_lms_scale_times_rank_is_alpha() -> None:
    given = {"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}}
    options, notes, faults = translate(given)
    assert (options, faults) == ({"rank": 8, "alpha": 160.0, "dropout": 0.1, "targets": ["q_proj"]}, [])
    assert notes == [
        "lora_parameters.scale 20 with rank 8 -> alpha 160",
        "lora_parameters.keys -> targets q_proj",
    ]


def test_mlx_lms_scale_by_its_dotted_name_takes_the_rank_beside_it() -> None:
    options, notes, faults = translate({"lora_parameters.scale": "2.5", "rank": "4"})
    assert (options, faults) == ({"rank": "4", "alpha": 10.0}, [])
    assert notes == ["lora_parameters.scale 2.5 with rank 4 -> alpha 10"]


def test_mlx_lms_rank_beside_another_rank_is_a_fault() -> None:
    _, _, faults = translate({"lora_parameters": {"rank": 8, "scale": 20.0}, "rank": 4})
    assert any("rank is given twice" in fault for fault in faults)


def test_an_unknown_lora_parameter() -> None:
    faults = translate({"lora_parameters": {"rank": 8, "alpha": 16}})[2]
    assert faults == ["lora_parameters.alpha: unknown; mlx_lm has rank, scale, dropout, keys"]


def test_lora_parameters_that_are_no_mapping() -> None:
    assert translate({"lora_parameters": "x"})[2] == [
        "lora_parameters: must be a mapping of rank, scale, dropout, keys (got 'x')"
    ]
    assert translate({"lora_parameters": None}) == ({}, [], [])


def test_lora_parameters_that_are_no_numbers() -> None:
    faults = translate({"lora_parameters": {"rank": "big"}})[2]
    assert faults == ["lora_parameters: rank and scale must be numbers"]


# --- what means something else


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("fp16", True, "fp16: float16 overflows in Gemma-3 and is very slow on CPUs; use precision: bf16 or fp32"),
        ("packing", True, "packing: rows of like length are computed together without packing"),
        ("lr_schedule", {"name": "cosine_decay"}, "lr_schedule: mlx_lm's list of function and arguments"),
        ("datasets", [{"path": "x"}], "datasets: Axolotl's list; use data with files or folders"),
        ("adapter_path", "adapters", "adapter_path: mlx_lm's folder for adapters alone"),
    ],
)
def test_what_means_something_else_is_explained(key: str, value: object, said: str) -> None:
    options, notes, faults = translate({key: value})
    assert (options, notes, len(faults)) == ({}, [], 1)
    assert faults[0].startswith(said)


@pytest.mark.parametrize("key", ["fp16", "sample_packing"])
def test_what_is_turned_off_elsewhere_asks_for_nothing_here(key: str) -> None:
    assert translate({key: False})[2] == []


def test_a_target_switch_that_is_off_is_not_turned_on() -> None:
    options, _, faults = translate({"lora_target_linear": False, "lora_target_modules": ["q_proj"]})
    assert (options, faults) == ({"targets": ["q_proj"]}, [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer: 'sgd' is not offered, only 'adamw'"),
        ({"warmup_ratio": 10}, "warmup_ratio: must be below 1 (got 10)"),
        ({"val_set_size": 100}, "val_set_size: Axolotl's count of rows; valid_share takes a share below 1 (got 100)"),
    ],
)
def test_a_value_that_is_not_offered(given: dict[str, Any], said: str) -> None:
    assert translate(given)[2] == [said]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 8, "lora_r": 8}, "rank is given twice, once under another name"),
        ({"r": 8, "lora_r": 8}, "lora_r means rank, which is given already"),
    ],
)
def test_one_option_under_two_names(given: dict[str, Any], said: str) -> None:
    assert translate(given)[2] == [said]


# --- through the front door


def test_a_translation_says_where_it_was_written(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: x.jsonl\nlora_r: 4\n")
    options, notes = load_options({"config": str(config), "max_seq_length": "99"})
    assert (options.rank, options.max_length) == (4, 99)
    assert notes == [f"{config}: lora_r -> rank 4", "flags: max_seq_length -> max_length 99"]


def test_an_explanation_and_a_misspelling_are_both_named(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("packing: true\nrnak: 4\n")
    with pytest.raises(UserError) as caught:
        load_options({"config": str(config)})
    assert f"{config}: packing: rows of like length" in caught.value.what
    assert f"{config}: rnak is not an option; did you mean 'rank'?" in caught.value.what


def test_a_whole_trl_recipe() -> None:
    given = {
        "model_name_or_path": "a/b",
        "dataset_name": "rows.jsonl",
        "lora_r": "8",
        "lora_alpha": "16",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "4",
        "num_train_epochs": "2",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_ratio": "0.1",
        "learning_rate": "1e-4",
    }
    options, notes = load_options(given)
    assert (options.model, options.data, options.batch_size, options.epochs) == ("a/b", ["rows.jsonl"], 8, 2)
    assert (options.schedule, options.warmup, options.learning_rate) == ("constant", 0.1, 1e-4)
    assert len(notes) == 8


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"num_layers": 16}, {"layers": "last:16"}),
        ({"num_layers": -1}, {}),
        ({"grad_checkpoint": True}, {"gradient_checkpointing": True}),
        ({"fine_tune_type": "dora"}, {"method": "dora"}),
        ({"load_in_4bit": True}, {"quantization": "4bit"}),
        ({"load_in_8bit": "true"}, {"quantization": "8bit"}),
        ({"load_in_8bit": False}, {}),
        ({"adapter": "lora"}, {}),
        ({"adapter": "qlora", "load_in_4bit": True}, {"quantization": "4bit"}),
        ({"adapter": "qlora"}, {"quantization": "4bit"}),
        ({"adapter": "runs/one"}, {"adapter": "runs/one"}),
        ({"use_rslora": True}, {"rslora": True}),
        ({"peft_use_dora": True}, {"method": "dora"}),
        ({"train_on_inputs": True}, {"train_on": "all"}),
        ({"train_on_inputs": False}, {}),
        ({"loraplus_lr_ratio": 16}, {"lora_plus": 16}),
    ],
)
def test_what_shapes_the_adapter_elsewhere(given: dict, meant: dict) -> None:
    assert translate(given)[0] == meant
    assert translate(given)[2] == []


@pytest.mark.parametrize("name", ["batch_size", "grad_accumulation_steps"])
def test_iters_beside_an_empty_value(name: str) -> None:
    _, _, faults = translate({"iters": 600, name: None})
    assert faults == [f"{name}: must be a whole number from 1 up (got None)"]

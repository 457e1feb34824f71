"""Configurations of other programs, as their users write them: each becomes a file that train loads."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from common.config_values import is_secret
from common.errors import UserError
from common.migration import migrated
from common.option_sources import load_options
from common.option_translation import KNOWN
from common.options import Options, by_flag
from common.other_configs import TOOLS, read_config, recognized
from tests import ROOT

FILES = {
    "mlx-lm": """
model: mlx-community/Llama-3.2-1B-Instruct
train: true
data: data/persona
fine_tune_type: lora
optimizer: adamw
num_layers: 8
batch_size: 4
grad_accumulation_steps: 4
iters: 800
val_batches: 10
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
adapter_path: adapters
save_every: 400
max_seq_length: 1536
grad_checkpoint: true
mask_prompt: true
lora_parameters: {keys: [self_attn.q_proj, self_attn.v_proj], rank: 16, scale: 2.0, dropout: 0.05}
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [3e-5, 1000, 1e-7]}
""",
    "axolotl": """
base_model: meta-llama/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_4bit: true
datasets:
  - {path: data/alpaca.jsonl, type: alpaca}
  - {path: some/chats, type: chat_template, field_messages: talks}
val_set_size: 0.05
output_dir: ./outputs/qlora
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project: my-llama
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
warmup_steps: 10
evals_per_epoch: 4
chat_template: tokenizer_default
special_tokens: {pad_token: <|end_of_text|>}
""",
    "llama-factory": """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,rows
template: qwen
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
output_dir: saves/qwen
plot_loss: true
report_to: swanlab
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
some_new_count: 7
""",
    "trl": """
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
max_steps: 300
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: <|im_end|>
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: SFT
packing: true
max_length: 2048
report_to: [trackio]
dtype: bfloat16
optim: adafactor
hub_token: hf_precious
""",
    "unsloth": """
from unsloth import FastLanguageModel
!pip install unsloth
import os; os.system("touch executed")
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", max_seq_length = max_seq_length,
    dtype = None, load_in_4bit = True, token = "hf_precious",
)
model = FastLanguageModel.get_peft_model(
    model, r = 16, target_modules = ["q_proj", "v_proj"], lora_alpha = 32, lora_dropout = 0, bias = "none",
    use_gradient_checkpointing = "unsloth", random_state = 3407, use_rslora = True, loftq_config = None,
)
trainer = SFTTrainer(model = model, train_dataset = rows(), dataset_text_field = "text", args = SFTConfig(
    per_device_train_batch_size = 2, gradient_accumulation_steps = 4, warmup_steps = 5, max_steps = 60,
    learning_rate = 2e-4, fp16 = not supported(), optim = "adamw_8bit", weight_decay = 0.01,
    lr_scheduler_type = "linear", output_dir = "outputs", report_to = "none",
))
trainer = train_on_responses_only(trainer, instruction_part = "<|user|>", response_part = "<|assistant|>")
""",
}
WANTED: dict[str, dict[str, Any]] = {
    "mlx-lm": {
        **{"model": "mlx-community/Llama-3.2-1B-Instruct", "data": ["data/persona"], "method": "lora", "rank": 16},
        **{"alpha": 32.0, "dropout": 0.05, "targets": ["q_proj", "v_proj"], "layers": "last:8", "batch_size": 16},
        **{"steps": 200, "eval_every": 50, "save_every": 100, "warmup": 25, "schedule": "cosine", "eval_rows": 40},
        **{"learning_rate": 3e-5, "max_length": 1536, "max_grad_norm": 0.0, "train_on": "assistant", "patience": 0},
        **{"gradient_checkpointing": True, "overflow": "truncate", "output": "adapters", "recipe": "fixed"},
    },
    "axolotl": {
        **{"model": "meta-llama/Llama-3.2-1B", "data": ["data/alpaca.jsonl", "some/chats"], "quantization": "4bit"},
        **{"valid_share": 0.05, "max_length": 2048, "rank": 32, "alpha": 16.0, "targets": ["all-linear"], "epochs": 4},
        **{"batch_size": 8, "learning_rate": 2e-4, "warmup": 10, "schedule": "cosine", "precision": "auto", "seed": 42},
        **{"track": ["wandb"], "track_project": "my-llama", "overflow": "drop", "chat_template": None},
    },
    "llama-factory": {
        **{"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": [], "rank": 8, "alpha": 16.0, "targets": ["all-linear"]},
        **{
            "batch_size": 8,
            "epochs": 3.0,
            "warmup": 0.1,
            "precision": "bf16",
            "valid_share": 0.0,
            "track": ["swanlab"],
        },
    },
    "trl": {
        **{"model": "Qwen/Qwen2-0.5B", "data": ["trl-lib/Capybara"], "steps": 300, "epochs": None, "batch_size": 16},
        **{"rank": 32, "alpha": 16.0, "dropout": 0.05, "schedule": "linear", "warmup": 0.0, "eval_every": 100},
        **{"precision": "bf16", "track": ["trackio"], "method": "lora", "max_length": 2048},
    },
    "unsloth": {
        **{"model": "unsloth/Llama-3.2-1B-Instruct", "quantization": "4bit", "rank": 16, "alpha": 32.0, "steps": 60},
        **{"rslora": True, "targets": ["q_proj", "v_proj"], "seed": 3407, "batch_size": 8, "weight_decay": 0.01},
        **{"train_on": "assistant", "warmup": 5, "max_length": 2048, "gradient_checkpointing": True, "track": []},
    },
}
SAID = {
    "mlx-lm": [
        "# mlx_lm's iters 800 micro-batches -> steps 200",
        "# lora_parameters.scale 2 with rank 16 -> alpha 32",
        "# - steps_per_report: not needed",
    ],
    "axolotl": [
        "# micro_batch_size 2 x gradient_accumulation_steps 4 -> batch_size 8 rows a step",
        "# - sample_packing: a row there is several packed ones",
        "# - datasets some/chats: field_messages; name columns by field",
        "# - special_tokens {'pad_token'",
        "# - chat_template tokenizer_default: the model's own template is used",
    ],
    "llama-factory": [
        "# - some_new_count 7: not known here; look whether it matters",
        "# - template qwen: ",
        "# - dataset identity,rows: a name in dataset_info.json",
        "# - lora_alpha is not in the file: LLaMA-Factory takes twice the rank",
    ],
    "trl": [
        "# - num_train_epochs 1: max_steps counts, as it does there",
        "# - optim: 'adafactor' is not offered",
        "# - hub_token: keys stay in the environment",
        "# - lora_target_modules is not in the file: PEFT chooses by model",
    ],
    "unsloth": [
        "; quantized here from the 16-bit model",
        "# - fp16 (line 16): not supported() is no literal",
        "# - the rows are made by code in the script",
    ],
}


def written(folder: Path, tool: str, text: str | None = None) -> Path:
    path = folder / ("train.ipynb" if tool == "unsloth" else "train.yaml")
    text = FILES[tool] if text is None else text
    if tool == "unsloth":
        cells = [{"cell_type": "markdown", "source": ["# A title"]}, {"cell_type": "code", "source": [text]}]
        text = json.dumps({"cells": cells, "nbformat": 4})
    path.write_text(text, encoding="utf-8")
    return path


def migrate(path: Path) -> tuple[str, Options]:
    """The text, and the options that train makes of it."""
    values, unread = read_config(path)
    text = migrated(path, values, recognized(path, values), unread)
    made = path.with_name("made.yaml")
    made.write_text(text, encoding="utf-8")
    options, notes = load_options({"config": str(made)})
    assert notes == []  # all of it in Twintune's own words
    return text, options


@pytest.mark.parametrize("tool", TOOLS)
def test_a_configuration_becomes_one_that_train_loads(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, tool)
    assert recognized(path, read_config(path)[0]) == tool
    text, options = migrate(path)
    made = options.model_dump()
    assert {name: made[name] for name in WANTED[tool]} == WANTED[tool]
    assert [line for line in SAID[tool] if line not in text] == []
    assert "precious" not in text
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_key_is_named_in_the_result(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, tool)
    values, _ = read_config(path)
    text, _ = migrate(path)
    silent = {"train_on_responses_only", "mask_prompt", "dtype", "stage", "use_peft"}  # what the result assumes
    missing = [key for key, value in values.items() if value is not None and key not in text]
    assert set(missing) <= silent


def test_a_script_and_its_notebook_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(FILES["unsloth"].replace("!pip install unsloth", "pass"))
    assert migrate(script)[1] == migrate(written(tmp_path, "unsloth"))[1]


def test_llama_factorys_names_of_data_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text("[]")
    info = {"rows": {"file_name": "rows.json"}, "identity": {"hf_hub_url": "some/identity"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    assert migrate(written(tmp_path, "llama-factory"))[1].data == ["some/identity", "data/rows.json"]


def test_what_llama_factory_says_of_its_data_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    entry = {
        **{"hf_hub_url": "some/chats", "subset": "ja", "split": "train_gen", "num_samples": 1000},
        **{"formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}, "tags": {"role_tag": "who"}},
    }
    file = FILES["llama-factory"].replace("dataset: identity,rows", "dataset: chats")
    assert file != FILES["llama-factory"]
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"chats": entry}))
    text, options = migrate(written(tmp_path, "llama-factory", file))
    assert options.data == ["some/chats:ja#train_gen"]
    assert options.field == {"conversations": "talk", "system": "sys"}
    assert "# - dataset chats, num_samples 1000: not read" in text
    assert "# - dataset chats, tags {'role_tag': 'who'}: not read" in text
    alpaca = {"file_name": "rows.json", "columns": {"prompt": "instruction", "query": "input", "response": "output"}}
    two = {"identity": {"hf_hub_url": "a/b", "columns": {"response": "said"}}, "rows": alpaca}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(two))
    text, options = migrate(written(tmp_path, "llama-factory"))
    assert (options.data, options.field) == (["a/b", "rows.json"], {})
    assert "# - dataset identity, columns {'response': 'said'}: not read" in text
    assert "dataset rows, columns" not in text
    plain = {"file_name": "rows.json", "columns": {"prompt": "text", "query": None, "history": ""}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"chats": plain}))
    assert migrate(written(tmp_path, "llama-factory", file))[1].field == {}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"chats": plain | {"columns": {"prompt": "body"}}}))
    assert migrate(written(tmp_path, "llama-factory", file))[1].field == {"text": "body"}


def test_trl_without_peft_trains_every_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, options = migrate(written(tmp_path, "trl", FILES["trl"].replace("use_peft: true", "bf16: true")))
    assert (options.method, options.precision) == ("full", "auto")
    assert "# - lora_r 32: use_peft is not on" in text


def test_what_mlx_lm_does_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, options = migrate(written(tmp_path, "mlx-lm", "model: a/b\nfine_tune_type: lora\nadapter_path: x\n"))
    assert (options.steps, options.batch_size, options.learning_rate, options.alpha) == (1000, 4, 1e-5, 160.0)
    assert (options.schedule, options.warmup, options.train_on, options.layers) == ("constant", 0, "all", "last:16")
    assert "# - iters is not in the file: mlx_lm.lora takes 1000, and so does this file" in text


def test_mlx_lms_optimizer_and_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = "optimizer_config: {adamw: {weight_decay: 0.1, betas: [0.8, 0.95], eps: 1.0e-6, foreach: true}}\n"
    text, options = migrate(written(tmp_path, "mlx-lm", f"iters: 8\nadapter_path: x\noptimizer: adamw\n{config}"))
    assert (options.weight_decay, options.beta1, options.beta2, options.epsilon) == (0.1, 0.8, 0.95, 1e-6)
    assert "# - optimizer_config, adamw: foreach True: not offered" in text
    plain = "iters: 8\nadapter_path: x\noptimizer: adamw\n"
    assert migrate(written(tmp_path, "mlx-lm", plain))[1].weight_decay == 0.01
    falls = "lr_schedule: {name: cosine_decay, arguments: [3.0e-5, 8]}\n"
    text, options = migrate(written(tmp_path, "mlx-lm", plain + falls))
    assert (options.schedule, options.learning_rate) == ("cosine", 3e-5)
    assert "learning_rate is not in the file" not in text
    rises = "lr_schedule: {name: linear_schedule, arguments: [0.0, 1.0e-5, 8]}\n"
    options = migrate(written(tmp_path, "mlx-lm", plain + rises))[1]
    assert (options.schedule, options.learning_rate) == ("constant", 1e-5)


def test_a_value_that_is_not_taken_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, options = migrate(written(tmp_path, "axolotl", FILES["axolotl"].replace("lora_r: 32", "lora_r: many")))
    assert options.rank == 16
    assert "# - rank many: not taken: Input should be a valid integer" in text


# --- secrets

SECRETS = {
    "mlx-lm": "iters: 3\nWANDB_API_KEY: precious\nwandb-apikey: precious\noptimizer: {a: {hf_token: precious}}\n",
    "axolotl": "base_model: a/b\ndatasets: [{path: rows.json, password: precious}]\nother: [[precious]]\n",
    "llama-factory": "stage: sft\nswanlab_lark_secret: precious\nswanlab_lark_webhook_url: precious\n"
    "cutoff_len: 'https://me:precious@mirror/x'\n",
    "trl": "dataset_name: a\ndtype: auto\nmodel_kwargs: {token: precious}\nnew: {thing: precious}\n"
    "more: 'https://me:precious@mirror/x'\nother: \"{'token': 'hf_ABCDEFGHIJKLMNOPQRSTpreciousUVWXYZ'}\"\n",
    "unsloth": """LoraConfig(r=8, model_init_kwargs={"token": "precious"}, Secret_Name="precious", bias=f("precious"))
SFTConfig(loftq_config={"a": "precious"}, output_dir="b", eval_strategy=g(f"{x}precious"))
SFTConfig(loftq_config={"b": "precious"}, bnb={"api-key": "precious"})
""",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_no_secret_gets_into_the_result(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(written(tmp_path, tool, SECRETS[tool]))
    assert "precious" not in text
    said = {"trl": "- new: not known here", "unsloth": "- bias (line 1): an expression is no literal"}
    assert said.get(tool, "") in text
    assert "keys stay in the environment" in text


@pytest.mark.parametrize(
    "key",
    [
        *("hub_token", "push_to_hub_token", "TOKEN", "Password", "aws_access_key_id", "authToken", "key", "licenseKey"),
        *("wandb_key", "WANDB-KEY", "comet_keys", "openai_key", "comet_experiment_key"),
    ],
)
def test_keys_of_secrets(key: str) -> None:
    assert is_secret(key)


def test_no_setting_that_is_known_is_a_secret() -> None:
    read = [constant for reader in READ_BY for constant in texts_of(ROOT / "common" / reader)]
    others = ["max_tokens", "add_eos_token", "tokenizer", "query_key", "template_thinking_key", "prompt_key", "keys"]
    known = {*KNOWN, *by_flag(), *others, *read}
    assert len(known) > 300
    assert [key for key in known if is_secret(key)] == []


READ_BY = (
    "other_data.py",
    "migration.py",
    "migration_tools.py",
    "other_configs.py",
    "other_scripts.py",
    "other_trainings.py",
)


def texts_of(path: Path) -> list[str]:
    """The texts of a module that may be keys."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in found if text.isidentifier()]


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "unsloth"])
def test_of_unknown_keys_only_numbers_and_switches_are_shown(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = "wandb_key: precious1\nnew_login: precious2\nnew_count: 17\nnew_share: 0.5\nnew_switch: false\n"
    text, _ = migrate(written(tmp_path, tool, FILES[tool] + new))
    assert "precious" not in text
    assert "# - wandb_key: keys stay in the environment" in text
    assert "# - new_login: not known here" in text
    assert "# - new_count 17: not known here" in text
    assert "# - new_share 0.5: not known here" in text
    assert "# - new_switch False: not known here" in text


def test_two_texts_of_a_key_in_a_script_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    calls = 'from_pretrained("a/b", login="precious1", new=3)\nfrom_pretrained("a/b", login="precious2", new=4)\n'
    text, _ = migrate(script(tmp_path, calls))
    assert "precious" not in text
    assert "# - login (line 2): another value in a second call" in text
    assert "# - new (line 2): 4 in a second call; 3 is taken" in text


# --- what a script computes


def script(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def test_what_is_computed_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, options = migrate(script(tmp_path, "LoraConfig(r=rank)\nSFTConfig(max_steps=n(), eval_strategy=s, seed=3)\n"))
    assert (options.rank, options.epochs, options.seed) == (16, 3, 3)
    assert "# - r: computed in the script; r 16 is the default of Unsloth: set it yourself" in text
    assert "# - max_steps: computed in the script; num_train_epochs 3 is the default of Unsloth" in text
    assert "r is not in the file" not in text
    assert "# - lora_alpha is not in the file: Unsloth takes 16" in text
    assert "# - eval_strategy is computed in the script: if nothing" in text
    assert options.valid_share != 0


@pytest.mark.parametrize(
    ("call", "batch_size", "warmup", "weight_decay", "seed"),
    [("SFTConfig", 8, 0.1, 0.001, 3407), ("TrainingArguments", 8, 0, 0.0, 42)],
)
def test_unsloth_changes_the_defaults_of_one_class(
    call: str, batch_size: int, warmup: float, weight_decay: float, seed: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code = f'FastLanguageModel.from_pretrained("unsloth/tiny", 512)\nget_peft_model(model, 4)\n{call}(max_steps=9)\n'
    _, options = migrate(script(tmp_path, code))
    assert (options.model, options.max_length, options.rank, options.steps) == ("unsloth/tiny", 512, 4, 9)
    found = (options.batch_size, options.warmup, options.weight_decay, options.seed)
    assert found == (batch_size, warmup, weight_decay, seed)


@pytest.mark.parametrize("call", ["SFTConfig", "SFTTrainer"])
def test_keys_behind_stars_are_listed_as_not_read(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(script(tmp_path, f"LoraConfig(r=8)\n{call}(**dict(max_steps=60, hub_token='precious'))\n"))
    assert "# - ** (line 2): its settings are not read" in text
    assert "# - **: computed in the script; num_train_epochs 3 is the default of Unsloth: set it yourself" in text
    assert "precious" not in text


def test_an_expression_that_is_nested_too_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(script(tmp_path, f"LoraConfig(lora_alpha=8, r={'-' * 2000}x)\n"))
    assert "# - r (line 1): an expression is no literal" in text


# --- other programs' defaults


def test_what_axolotl_does_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, options = migrate(written(tmp_path, "axolotl", "base_model: a/b\ngradient_accumulation_steps: 4\n"))
    assert (options.epochs, options.batch_size, options.max_length) == (1, 4, 512)
    assert "# - num_epochs is not in the file: Axolotl takes 1" in text
    _, options = migrate(written(tmp_path, "axolotl", "base_model: a/b\nbatch_size: 6\nmax_steps: 9\n"))
    assert (options.epochs, options.batch_size, options.steps) == (None, 6, 9)


def test_llama_factory_with_another_name_of_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, options = migrate(written(tmp_path, "llama-factory", "stage: sft\ncutoff_len: 9\nr: 4\n"))
    assert (options.rank, options.alpha) == (4, 8)


@pytest.mark.parametrize("name", ["[a]", "{a: 1}", "5", "null"])
def test_a_schedule_of_no_name_is_listed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(written(tmp_path, "mlx-lm", f"iters: 8\nlr_schedule: {{name: {name}}}\n"))
    assert "# - lr_schedule {'name': " in text


# --- Axolotl's rows

ENTRIES: list[tuple[str, list[str], list[str]]] = [
    (
        "[{path: json, data_files: [a.jsonl, b.jsonl]}, {path: text, data_files: c.txt}]",
        ["a.jsonl", "b.jsonl", "c.txt"],
        [],
    ),
    ("[{path: here, data_files: [a.jsonl]}]", ["a.jsonl"], []),
    ("{path: a.jsonl, type: alpaca}", ["a.jsonl"], ["types (alpaca)"]),
    (
        "[a.jsonl, {path: b.jsonl}, {type: alpaca}, {path: ''}]",
        ["b.jsonl"],
        [f"datasets, entry {number}: it has no path, so it is not read" for number in (1, 3, 4)],
    ),
    ("a.jsonl", [], ["datasets, entry 1: it has no path"]),
    (
        "[{path: csv, data_files: {train: a.csv}}, {path: json}, {path: text, data_files: []}]",
        [],
        ["datasets csv: data_files names no files", "datasets json: data_files", "datasets text: data_files"],
    ),
    (
        "[{path: o/n, name: c, revision: v1, split: 'train[:5%]'}, {path: o/m, name: [x, y], split: test}]",
        ["o/n:c@v1#train[:5%]", "o/m:x#test", "o/m:y#test"],
        [],
    ),
    ("[{path: o/n, data_files: a.json}]", ["o/n"], ["datasets o/n: data_files: here all its files are read"]),
    (
        "[{path: a.jsonl, split: 'train[:9]', name: c, shards: 4, shards_idx: 1, preprocess_shards: 2}]",
        ["a.jsonl"],
        [
            "datasets a.jsonl: split train[:9]: a file is read whole",
            "datasets a.jsonl: name c: files have none",
            "datasets a.jsonl: shards 4, shards_idx 1: all rows are read here",
        ],
    ),
    ("[{path: a.jsonl, split: train}]", ["a.jsonl"], []),
    (
        "[{path: a.jsonl, field_messages: m, roles: {a: [b]}, type: {field_input: i}}]",
        ["a.jsonl"],
        [
            "datasets a.jsonl: field_messages; name columns by field",
            "datasets a.jsonl: roles: not known here",
            "datasets a.jsonl: type: a format of its own",
        ],
    ),
    (
        "[{path: 's3://b/a.jsonl'}, {path: 'd/*.jsonl'}, {path: a.arrow}, {path: a.jsonl}, {path: a.jsonl}]",
        ["a.jsonl"],
        [
            "datasets s3://b/a.jsonl: not read from there",
            "datasets d/*.jsonl: a pattern of names",
            "datasets a.arrow: such files are not read",
            "datasets a.jsonl: named again",
        ],
    ),
]


def test_a_file_beside_the_configuration_is_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.jsonl").touch()
    given = written(tmp_path / "other", "axolotl", "base_model: a/b\ndatasets: [{path: mine.jsonl}, {path: squad}]\n")
    text, options = migrate(given.relative_to(tmp_path))
    assert options.data == ["other/mine.jsonl"]
    assert "datasets squad: no such file here, and a set on the hub is named owner/name" in text


@pytest.mark.parametrize(("datasets", "sources", "said"), ENTRIES)
def test_axolotls_rows_are_sources_or_listed(
    datasets: str, sources: list[str], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    text, options = migrate(written(tmp_path, "axolotl", f"base_model: a/b\ndatasets: {datasets}\n"))
    assert options.data == sources
    assert [line for line in said if line not in text] == []
    listed = [line for line in text.splitlines() if line.startswith("# - datasets")]
    assert len(listed) == len([line for line in said if line.startswith("datasets")])


def test_an_entry_with_odd_keys_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "base_model: a/b\ndatasets: [{path: o/n, 5: 6, null: x, true: b, more: y}]\n"
    text, _ = migrate(written(tmp_path, "axolotl", rows))
    assert "# - datasets o/n: 5, None, True, more: not known here" in text


def test_trls_list_of_data_sets_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "datasets: [{path: o/n, name: c, split: train, columns: [a]}, {path: json, data_files: a.jsonl}]"
    text, options = migrate(written(tmp_path, "trl", f"dataset_name: x/y\nuse_peft: true\n{rows}\n"))
    assert options.data == ["o/n:c#train", "a.jsonl"]
    assert "# - dataset_name x/y: datasets count there" in text
    assert "# - datasets o/n: columns: not known here" in text
    assert "their formats are recognized" in text


def test_axolotls_other_rows_have_their_own_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "base_model: a/b\ntest_datasets: [{path: b.jsonl}]\npretraining_dataset: [{path: c4}]\n"
    text, _ = migrate(written(tmp_path, "axolotl", rows))
    assert "rows for validation: a folder with train.jsonl and valid.jsonl" in text
    assert "plain texts, read as a stream" in text


# --- what cannot be read


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.yaml", "model: [\n", "a.yaml cannot be read as YAML: "),
        ("a.yaml", "iters: 3\niters: 4\n", "line 2: iters is given twice"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[1]", "a.json is not a JSON object"),
        ("a.py", "model = (\n1", "a.py line 1 is not Python: '(' was never closed"),
        ("a.py", "x = 1", "a.py calls none of"),
        ("a.ipynb", "{}", "a.ipynb calls none of"),
        ("a.ipynb", '{"cells": 5}', "a.ipynb is not a notebook: its cells are not a list"),
        ("a.py", f"#{'x' * 1_000_000}", "a.py has more than 1 MB of code"),
        ("missing.yaml", None, "missing.yaml: no such file"),
        ("a.yaml", "hello: 1\n", "none of its keys is one of theirs"),
    ],
)
def test_what_cannot_be_read(name: str, text: str | None, fault: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        recognized(path, read_config(path)[0])
    assert fault in caught.value.what


OTHER_TRAININGS = [
    ("llama-factory", "finetuning_type: lora\nstage: dpo\n", "line 2: stage 'dpo' is"),
    ("axolotl", "base_model: a/b\nrl: dpo\ndatasets: [{path: a/b}]\n", "line 2: rl 'dpo' is"),
    ("axolotl", "base_model: a/b\nlora_r: 8\nreward_model: true\n", "line 3: reward_model is"),
    ("trl", "dataset_name: a/b\nuse_peft: true\nbeta: 0.1\n", "line 3: beta is"),
    ("trl", "dataset_name: a/b\nloss_type: sigmoid\n", "line 2: loss_type 'sigmoid' is"),
    ("trl", "dataset_name: a/b\nloss_type: [sigmoid, bco_pair]\n", "line 2: loss_type is"),
    ("trl", "dataset_name: a/b\nuse-vllm: false\n", "line 2: use_vllm is"),
    ("mlx-lm", "iters: 5\ntrain_mode: orpo\n", "line 2: train_mode 'orpo' is"),
]


@pytest.mark.parametrize(("tool", "text", "fault"), OTHER_TRAININGS)
def test_a_configuration_of_another_training_is_refused(tool: str, text: str, fault: str, tmp_path: Path) -> None:
    path = written(tmp_path, tool, text)
    with pytest.raises(UserError) as caught:
        migrate(path)
    assert caught.value.what == f"{path} {fault} another training."
    assert "Twintune trains on answers" in caught.value.fix


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        ("axolotl", "base_model: a/b\nrl:\nreward_model: false\n"),
        ("trl", "dataset_name: a/b\nuse_peft: true\nloss_type: nll\nbeta:\n"),
        ("llama-factory", "finetuning_type: lora\nstage: sft\n"),
    ],
)
def test_a_training_on_answers_is_not_refused(
    tool: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not known here" not in migrate(written(tmp_path, tool, text))[0]


def test_trls_other_loss_of_sft_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(written(tmp_path, "trl", "dataset_name: a/b\nloss_type: dft\n"))
    assert "# - loss_type: 'dft' is not offered, only 'nll'" in text


LOADED = 'model = FastLanguageModel.from_pretrained("a/b", 512)\nmodel = get_peft_model(model, r=4)\n'


@pytest.mark.parametrize(
    "call",
    [
        *("DPOConfig", "trl.ORPOTrainer", "KTOConfig", "GRPOTrainer", "CPOTrainer", "RewardConfig", "PPOv2Trainer"),
        *("RLOOConfig", "UnslothGRPOTrainer", "GKDTrainer", "DPOScriptArguments", "SentenceTransformerTrainer"),
    ],
)
def test_a_script_of_another_training_is_refused(call: str, tmp_path: Path) -> None:
    path = script(tmp_path, f"{LOADED}args = TrainingArguments(max_steps=9)\ntrainer = {call}(learning_rate=5e-6)\n")
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert caught.value.what == f"{path} line 4 calls {call.removeprefix('trl.')}: another training."


def test_a_notebook_of_another_training_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "unsloth", f"{LOADED}!pip install trl\nDPOTrainer(model, args=DPOConfig(beta=0.1))\n")
    with pytest.raises(UserError, match="line 4 of its code cells calls DPOTrainer: another training"):
        read_config(path)


def test_of_a_script_with_two_trainings_the_one_on_answers_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = "PatchDPOTrainer()\nSFTTrainer(model, args=SFTConfig(max_steps=9, learning_rate=2e-4))\n"
    second = "DPOTrainer(model, args=TrainingArguments(learning_rate=5e-6, weight_decay=0.5))\n"
    text, options = migrate(script(tmp_path, LOADED + first + second))
    assert (options.steps, options.learning_rate, options.weight_decay, options.rank) == (9, 2e-4, 0.001, 4)
    assert "# - DPOTrainer (line 5): another training" in text
    assert "PatchDPOTrainer" not in text


# --- options that exclude each other


def refused(path: Path, tool: str) -> UserError:
    values, unread = read_config(path)
    with pytest.raises(UserError) as caught:
        migrated(path, values, tool, unread)
    return caught.value


def test_keys_that_exclude_each_other_are_named_with_their_lines(tmp_path: Path) -> None:
    text = "dataset_name: a/b\n# a comment\nload-in-4bit: true\nlearning_rate: 1e-4\n"
    path = written(tmp_path, "trl", text)
    found = refused(path, "trl")
    assert found.what.splitlines() == [
        f"{path}: quantization cannot be combined with method full: quantized weights cannot be trained.",
        f"{path} line 3: quantization 4bit: load_in_4bit -> quantization 4bit",
        f"{path}: method full: without use_peft TRL trains every weight; lora needs far less memory",
    ]
    assert found.fix == "Change one of these in the file."


def test_a_file_that_is_taken_for_another_programs_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "axolotl")
    found = refused(path, "trl")
    assert f"{path} line 4: quantization 4bit: load_in_4bit" in found.what
    assert found.fix == "The file's keys are those of Axolotl: give --from axolotl."
    found = refused(path, "mlx-lm")
    line = FILES["axolotl"].splitlines().index("num_epochs: 4") + 1
    assert f"{path} line {line}: epochs 4: num_epochs -> epochs 4" in found.what
    assert f"{path}: steps 1000: mlx_lm's iters 1000" in found.what


def test_a_file_of_another_program_that_is_read_is_told_too(tmp_path: Path) -> None:
    path = written(tmp_path, "axolotl", "base_model: a/b\nnum_epochs: 2\nmicro_batch_size: 1\n")
    said = "# - The file's keys are those of Axolotl: give --from axolotl."
    values, unread = read_config(path)
    assert said in migrated(path, values, "trl", unread)
    assert said not in migrated(path, values, "axolotl", unread)


def test_the_line_of_a_json_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n  "dataset_name": "a/b",\n  "load_in_8bit": true\n}')
    assert f"{path} line 3: quantization 8bit" in refused(path, "trl").what


def test_unsloth_trains_all_weights_without_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, said in (("", False), (", load_in_4bit=True", True)):
        text, options = migrate(script(tmp_path, f'from_pretrained("a/b", full_finetuning=True{given})\n'))
        assert (options.method, options.quantization) == ("full", "none")
        assert ("# - load_in_4bit True: full_finetuning: Unsloth turns it off" in text) == said


def test_hostile_values_stay_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = migrate(written(tmp_path, "axolotl", FILES["axolotl"] + '"x\\npush": "a\\nexport: none"\n'))
    assert "\nexport:" not in text
    assert "\npush" not in text


# --- the command


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["twintune", "migrate", *argv])
    cli.main()


def test_the_command_shows_and_writes_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, "trl")
    run(monkeypatch, path.name)
    shown = capsys.readouterr().out
    run(monkeypatch, path.name, "--from", "trl", "--output", "new.yaml")
    assert (tmp_path / "new.yaml").read_text() == shown
    assert "new.yaml is written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, path.name, "--output", "new.yaml")
    assert "--output new.yaml is there already" in capsys.readouterr().err

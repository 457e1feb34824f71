"""The README's commands as a user types them: a real model, both backends, the real llama.cpp."""

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
from common.data.load import read_rows
from common.llama_cpp.build import ensure
from common.llama_cpp.server import Server, ServerOptions
from common.models import adapter_files as adapters
from common.models import gguf_import
from common.models.resolve import resolve
from common.training import checkpoint
from tests import ROOT
from tests.encoding import encode
from tests.go_interpreter import execute
from tests.tiny import chat, write_model, write_rows
from tests.unit.modelfile_parser import read_modelfile

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXAMPLE = ROOT / "examples" / "data"


def twintune(*words, code=0, **settings):
    """Run the command line; its exit code is checked, its output returned."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, **settings)
    assert done.returncode == code, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def both_cores():
    """The environment without conftest's limit of one thread, which is for tiny models."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}


@pytest.fixture(scope="module", params=["torch", "mlx"])
def trained(request, tmp_path_factory):
    """A short real run of each backend: the folder, and what it printed."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    data = run.parent / "data"
    data.mkdir()
    for name, count in (("train", 120), ("valid", 8)):
        lines = (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = twintune(
        "train", "--config", ROOT / "configs" / "quickstart.yaml", "--data", data, "--output", run,
        "--backend", request.param, "--precision", "fp32", "--steps", 45, "--eval-every", 15,
        "--quant", "Q4_K_M", "Q8_0", env=both_cores(),
    )  # fmt: skip
    return request.param, run, out


def example_ids():
    folder = resolve(SMOLLM2, print).path
    return folder, encode(read_rows(EXAMPLE / "valid.jsonl")[0], load_tokenizer(folder)).ids


def test_the_run_folder_is_complete(trained):
    backend, run, out = trained
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["backend"] == backend
    assert record["steps"] == 45
    assert record["exported_adapter"] == "best"
    for key in ("tokens_per_second", "label_tokens_per_second", "peak_memory_bytes", "peak_rss_bytes"):
        assert record[key] > 0, key
    assert 0 <= record["padding_fraction"] < 0.2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 45
    assert np.mean(losses[-5:]) < losses[0] / 4
    assert [line["step"] for line in lines if "valid_loss" in line] == [15, 30, 45]
    for name in ("recipe.yaml", "plan.yaml", "environment.json", "fused/model.safetensors", "fused/tokenizer.json"):
        assert (run / name).exists(), name
    assert not list((run / "gguf").glob("*BF16*"))
    assert re.search(rf"backend\s+{backend}: asked for", out)


def test_peft_loads_the_adapter_with_the_logits_that_were_trained(trained):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run, _ = trained
    folder, ids = example_ids()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fused = AutoModelForCausalLM.from_pretrained(run / "fused", dtype=torch.float32)
    inputs = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        plain = base(inputs).logits
        merged = fused(inputs).logits
        tuned = PeftModel.from_pretrained(base, run / "adapter")(inputs).logits
    assert (tuned - plain).abs().max() > 1.0
    # the fused weights are rounded to the base's bf16, the adapter is not
    assert (tuned - merged).abs().max() < 0.1 * (tuned - plain).abs().max()


def test_mlx_lm_loads_the_adapter_with_the_same_logits_as_peft(trained):
    import mlx.core as mx
    import torch
    from mlx_lm import load as mlx_load
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run, _ = trained
    folder, ids = example_ids()
    mx.set_default_device(mx.cpu)
    model, _ = mlx_load(str(folder), adapter_path=str(run / "adapter-mlx"))
    model.set_dtype(mx.float32)
    got = np.array(model(mx.array(ids[None]))[0].astype(mx.float32))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        want = PeftModel.from_pretrained(base, run / "adapter")(torch.tensor(ids[None].astype(np.int64)))
    assert np.abs(got - plain).max() > 1.0
    np.testing.assert_allclose(got, want.logits[0].numpy(), atol=2e-3)


def test_mlx_lm_generates_with_the_adapter_as_it_is(trained):
    _, run, _ = trained
    folder, _ = example_ids()
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(folder), "--adapter-path"]
    command += [str(run / "adapter-mlx"), "--prompt", "hi", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Generation: 4 tokens" in done.stdout


def test_both_layouts_hold_the_same_weights(trained):
    _, run, _ = trained
    one, other = adapters.read_peft(run / "adapter"), adapters.read_mlx(run / "adapter-mlx")
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        np.testing.assert_array_equal(weight.A, other.weights[name].A)
        np.testing.assert_array_equal(weight.B, other.weights[name].B)


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0"])
def test_llama_cpp_answers_from_the_gguf_as_tuned_and_stops(trained, quant):
    _, run, _ = trained
    rows = read_rows(EXAMPLE / "valid.jsonl")[:6]
    prompts = [[dict(m) for m in row.messages[:-1]] for row in rows]
    with Server(
        ensure(None, lambda share, text: None), run / "gguf" / f"model-{quant}.gguf", ServerOptions(context=512)
    ) as server:
        answers = server.chat_many(prompts, 64, lambda share, text: None)
    wanted = [row.messages[-1]["content"] for row in rows]
    # this few steps teach the tone, if not yet every word; an answer that never stops would be far longer
    assert all(len(answer) < 2 * len(want) + 20 for answer, want in zip(answers, wanted, strict=True)), answers
    openings = {want[:3] for row in read_rows(EXAMPLE / "train.jsonl") for want in [row.messages[-1]["content"]]}
    assert sum(answer[:3] in openings for answer in answers) >= 4, answers


def test_the_export_is_verified_at_its_end_and_again(trained):
    _, run, _ = trained
    kept = json.loads((run / "run.json").read_text())["verify"]
    assert kept["verdict"] != "broken"
    found = {check["name"]: check["state"] for check in kept["checks"]}
    assert [found[name] for name in ("token ids", "prompt", "stop", "fused", "bf16 GGUF")] == ["ok"] * 5
    assert kept["held_out"]
    assert not (run / "gguf" / "model-BF16.gguf").exists()
    assert "Verdict: sound" in twintune("verify", run)


def test_the_modelfile_prompts_as_the_chat_template_does(trained):
    _, run, _ = trained
    commands = dict(read_modelfile((run / "gguf" / "Modelfile").read_text(encoding="utf-8")))
    assert commands["from"] == "./model-Q4_K_M.gguf"
    assert commands["stop"] == "<|im_end|>"
    tokenizer = load_tokenizer(run / "fused")
    for row in read_rows(EXAMPLE / "valid.jsonl"):
        messages = [dict(message) for message in row.messages[:-1]]
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert execute(commands["template"], messages) == wanted


def test_the_run_is_ready_for_the_hub(trained):
    _, run, _ = trained
    text = (run / "fused" / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in text
    assert "120 training rows, 8 validation rows" in text
    assert str(run.parent) not in text
    out = " ".join(twintune("push", run, "me/pip", "--dry-run").split())
    for name in ("README.md", "model.safetensors", "adapter/adapter_model.safetensors", "gguf/model-Q8_0.gguf"):
        assert name in out
    assert "checkpoints" not in out
    assert "dry run: nothing was sent." in out


def test_fuse_makes_the_export_again(trained):
    _, run, _ = trained
    before = (run / "fused" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "fused")
    twintune("fuse", run, "--export", "fused")
    assert (run / "fused" / "model.safetensors").read_bytes() == before
    record = json.loads((run / "run.json").read_text())
    assert len(record["export"]["gguf"]) == 2, "what was exported before stays on record"
    assert record["stage_seconds"]["train"] > 0


def test_compare_prints_agreement_first(trained):
    _, run, _ = trained
    out = twintune("compare", run, run)
    assert out.index("agrees") < out.index("tokens/s")
    assert "the same recipe" in out


def score(code, *words):
    """`python -m examples.score`, as `make example` runs it; its exit code is checked, its output returned."""
    command = [sys.executable, "-m", "examples.score", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == code, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_the_built_in_example_counts_before_and_after(tmp_path):
    options = ["--steps", 4, "--output", tmp_path / "run", "--backend", "torch"]
    twintune("train", *options)
    assert "example" not in json.loads((tmp_path / "run" / "run.json").read_text())
    out = score(1, "--at-least", 61, "--trained", *options)  # of 60: it exits with status 1
    assert "Test answers that follow the form" in out
    counts = {when: int(n) for when, n in re.findall(r"(before|after)\D+(\d+)\D+60\D+\d+%", out)}
    assert counts.keys() == {"before", "after"}
    assert counts["before"] <= 3
    assert len((tmp_path / "run" / "example.jsonl").read_text(encoding="utf-8").splitlines()) == 60


def test_without_a_gguf_of_the_example_there_is_nothing_to_count(tiny, tmp_path):
    options = tiny_train(tiny, tmp_path / "run", "torch", "--steps", 2)[1:]
    twintune("train", *options)
    assert "has no GGUF" in score(0, "--trained", *options)


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


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_an_interrupted_run_goes_on_to_the_last_bit(tiny, tmp_path, backend, how):
    steps = ["--steps", 400]
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, tiny_train(tiny, tmp_path / "cut", backend, *steps))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(how)
    out = process.communicate(timeout=120)[0]
    if how == signal.SIGINT:
        assert process.returncode == 130, out
        assert f"--resume {tmp_path / 'cut'}" in out
    assert len(step_losses(tmp_path / "cut")) < 400, "the run was over before it was interrupted"
    twintune("train", "--resume", tmp_path / "cut")
    twintune(*tiny_train(tiny, tmp_path / "complete", backend, *steps))
    assert step_losses(tmp_path / "cut") == step_losses(tmp_path / "complete")
    cut, complete = (adapters.read_peft(tmp_path / name / "adapter") for name in ("cut", "complete"))
    for name, weight in complete.weights.items():
        np.testing.assert_array_equal(cut.weights[name].B, weight.B)


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
    gguf = gguf_import.mirror_gguf(gguf_import.MIRRORS[SMOLLM2], print)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path)
    folder = resolve(str(gguf), print).path
    assert folder.is_relative_to(tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100_000.0
    assert resolve(str(gguf), print).path == folder
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("½5", add_special_tokens=False)][-1] == "5"
    name = "train", "--model", folder, "--data", EXAMPLE / "valid.jsonl", "--output", tmp_path / "run"
    twintune(*name, "--steps", 1, "--batch-size", 2, "--export", "none")


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
    first, last = step_losses(tmp_path / "run")[0][1], step_losses(tmp_path / "next")[0][1]
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

"""The built-in example as a user trains it: a real model, both backends, every export, the real llama.cpp."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from common.data.encode import load_tokenizer
from common.data.load import read_rows
from common.llama_cpp.build import ensure
from common.llama_cpp.server import Server, ServerOptions
from common.models import adapter_files as adapters
from common.models.resolve import resolve
from common.options import EXAMPLE
from tests import ROOT
from tests.e2e.command_line import score, twintune
from tests.encoding import encode
from tests.go_interpreter import execute
from tests.unit.modelfile_parser import read_modelfile

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module", params=["torch", pytest.param("mlx", marks=pytest.mark.long)])
def trained(request, tmp_path_factory):
    """A short run of each backend on some of the example's rows: the backend, the folder, and what it printed."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    data = run.parent / "data"
    data.mkdir()
    for name, count in (("train", 120), ("valid", 8)):
        lines = (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = twintune(
        "train", "--config", ROOT / "configs" / "quickstart.yaml", "--data", data, "--output", run,
        "--backend", request.param, "--precision", "fp32", "--steps", 45, "--eval-every", 15,
        "--quant", "Q4_K_M", "Q8_0",
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
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 15, 30, 45]
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


def test_eval_finds_the_loss_of_peft_and_the_answers_of_the_server(trained, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, run, _ = trained
    data = tmp_path / "test.jsonl"
    lines = (EXAMPLE / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ("--with", "base", "adapter", "gguf", "--quant", "Q4_K_M", "--scorer", ROOT / "examples" / "eval_score.py")
    out = twintune("eval", run, "--data", data, *words, "--max-tokens", 24, "--out", tmp_path / "eval")
    assert "Against the base, on the same rows" in out
    found = [json.loads(line)["models"] for line in (tmp_path / "eval" / "rows.jsonl").read_text().splitlines()]
    folder = resolve(SMOLLM2, print).path
    tokenizer = load_tokenizer(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    for models, row in zip(found, read_rows(data), strict=True):
        encoded = encode(row, tokenizer)
        ids = torch.tensor(encoded.ids[None].astype(np.int64))
        labels = torch.where(torch.tensor(encoded.mask[None]), ids, -100)
        with torch.no_grad():
            after = float(tuned(ids, labels=labels).loss)
            with tuned.disable_adapter():
                before = float(tuned(ids, labels=labels).loss)
        assert models["adapter"]["loss"] == pytest.approx(after, rel=1e-3)
        assert models["base"]["loss"] == pytest.approx(before, rel=1e-3)
        assert models["Q4_K_M"]["loss"] == pytest.approx(models["adapter"]["loss"], abs=0.3)
    with Server(
        ensure(None, lambda share, text: None), run / "gguf" / "model-Q4_K_M.gguf", ServerOptions(1024)
    ) as server:
        answers = [server.chat(json.loads(line)["messages"][:-1], 24) for line in lines]
    # what is computed at once rounds otherwise, and after 45 steps the model hesitates: the beginnings agree
    pairs = [(models["Q4_K_M"]["answer"], answer) for models, answer in zip(found, answers, strict=True)]
    assert sum(one[:2] == other[:2] for one, other in pairs) >= 3, pairs


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


def test_the_export_is_verified_at_its_end(trained):
    _, run, _ = trained
    kept = json.loads((run / "run.json").read_text())["verify"]
    assert kept["verdict"] != "broken"
    found = {check["name"]: check["state"] for check in kept["checks"]}
    assert [found[name] for name in ("token ids", "prompt", "stop", "fused", "bf16 GGUF")] == ["ok"] * 5
    assert kept["held_out"]
    assert not (run / "gguf" / "model-BF16.gguf").exists()


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


@pytest.mark.long
def test_the_example_is_counted_before_and_after(tmp_path):
    options = ["--steps", 4, "--output", tmp_path / "run", "--backend", "torch", "--no-verify"]
    twintune("train", *options)
    assert "example" not in json.loads((tmp_path / "run" / "run.json").read_text())
    out = score("--at-least", 61, "--trained", *options, code=1)  # of 60
    assert "Test answers that follow the form" in out
    counts = {when: int(n) for when, n in re.findall(r"(before|after)\D+(\d+)\D+60\D+\d+%", out)}
    assert counts.keys() == {"before", "after"}
    assert counts["before"] <= 3
    assert len((tmp_path / "run" / "example.jsonl").read_text(encoding="utf-8").splitlines()) == 60

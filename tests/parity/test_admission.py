"""--try-model: what both libraries compute alike is admitted; what one computes otherwise is refused, by layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.architectures import write_model
from common.commands.arguments import read_flags
from common.commands.train import run_training
from common.display import Display
from common.errors import Unable, UserError, device_fault
from common.export.mlx import check_model
from common.llama_cpp.convertible import check_convertible
from common.llama_cpp.lora import check_lora_model
from common.models import admitted
from common.models.adapter_files import read_peft
from common.models.families import is_known
from common.models.first_layers import enough_layers, write_first_layers
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.models.training_base import find_base
from common.option_sources import load_options
from common.run_record import Run
from common.verify import admission, gguf_peer, parity
from tests import backends
from tests.contexts import context
from tests.tiny import write_rows, write_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admitted, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Seed-OSS, which is of no supported family, with a tokenizer."""
    folder = tmp_path_factory.mktemp("seed_oss")
    assert not is_known(write_model("seed_oss", folder).written_config)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["seed_oss", "mamba", "lfm2_moe", "granitemoe", "granitemoehybrid", "phi"])
def test_what_both_libraries_compute_alike_is_admitted(kind: str, tmp_path: Path) -> None:
    verdict = admission.admit(write_model(kind, tmp_path / kind), context())
    assert verdict.why == ""
    assert verdict.admitted
    assert verdict.targets
    assert ("dt_proj" in verdict.checks.get("left out", "")) == (kind == "mamba")  # transformers reads its weight
    assert {*verdict.checks} - {"left out"} == {
        *("layers", "logits", "step losses", "adapters"),
        *(f"{what}, {name}" for what in ("gradient", "fused") for name in ("torch", "mlx")),
    }


def test_gpt_oss_is_trained_in_32_bits_and_its_yarn_is_computed_by_neither_reader(tmp_path: Path) -> None:
    """mlx-lm reads its experts in MXFP4 alone, and rounds its YaRN, as llama.cpp does."""
    model = write_model("gpt_oss", tmp_path / "gpt_oss")
    assert not model.config["rope_parameters"]["truncate"]
    verdict = admission.admit(model, context())
    assert (verdict.why, verdict.admitted) == ("", True)
    assert verdict.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    with pytest.raises(UserError, match="experts of a gpt-oss in MXFP4 alone, and rounds its YaRN"):
        check_model(model, Display("quiet"))
    with pytest.raises(UserError, match="rounds the range over which YaRN blends"):
        check_convertible(model.path)
    with pytest.raises(UserError, match="rounds the range over which YaRN blends"):
        check_lora_model(model)


def rope_of_another_base(model: Any) -> None:
    for layer in model.layers:
        layer.self_attn.rope.base = 500_000.0


def no_norm(model: Any) -> None:
    import mlx.nn as nn

    model.layers[1].post_attention_layernorm = nn.Identity()


def swapped_gate(model: Any) -> None:
    mlp = model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def exact_gelu(model: Any) -> None:
    """In place of that by tanh, which phi has in both libraries."""
    import mlx.nn as nn
    from mlx_lm.models.phi import PhiMLP

    class Exact(PhiMLP):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            return self.fc2(nn.gelu(self.fc1(x)))

    model.layers[1].mlp.__class__ = Exact


@pytest.mark.parametrize("kind", ["gemma", "starcoder2", "gpt_neox"])
def test_the_other_gelu_is_refused(kind: str, tmp_path: Path) -> None:
    """mlx-lm computes it exactly where transformers takes the tanh, and in GPT-NeoX the other way round."""
    verdict = admission.admit(write_model(kind, tmp_path / kind), context())
    assert not verdict.admitted
    assert "they part in layer 0" in verdict.why


@pytest.mark.parametrize(
    ("kind", "plant", "where"),
    [
        ("seed_oss", rope_of_another_base, "layer 0"),
        ("seed_oss", no_norm, "layer 1"),
        ("seed_oss", swapped_gate, "layer 1"),
        ("phi", exact_gelu, "layer 1"),
    ],
)
def test_what_one_library_computes_otherwise_is_refused_with_the_layer(
    kind: str, plant: Callable[[Any], None], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_backend.backend as backend

    load = backend.load_plain

    def faulty(*given: Any) -> Any:
        model = load(*given)
        if len(model.layers) > 1 or plant is rope_of_another_base:
            plant(model)
        return model

    monkeypatch.setattr(backend, "load_plain", faulty)
    verdict = admission.admit(write_model(kind, tmp_path / kind), context())
    assert not verdict.admitted
    assert verdict.why.startswith("transformers and mlx-lm compute other logits")
    assert f"they part in {where}" in verdict.why


def test_with_one_library_and_no_llama_cpp_it_says_that_nothing_was_compared(
    seed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admission._Trial, "_here", lambda trial: ["torch"])
    monkeypatch.setattr(gguf_peer, "own_build", lambda: None)
    verdict = admission.try_model(str(seed), context("plain"))
    assert verdict is not None
    assert verdict.checks[gguf_peer.PEER] == gguf_peer.NOT_BUILT
    assert "its logits were compared with none" in "".join(capsys.readouterr())
    monkeypatch.setattr(admission, "own_build", lambda: None)
    monkeypatch.setattr(parity, "run", lambda *given: pytest.fail("computed again"))
    assert admission.admit(ModelFolder(seed), context()) == verdict
    monkeypatch.setattr(admission, "own_build", lambda: "built")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        admission.admit(ModelFolder(seed), context())


def test_what_the_machine_could_not_do_is_no_verdict(seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> None:
        raise device_fault(RuntimeError("an illegal memory access"))

    monkeypatch.setattr(admission._Trial, "run", fails)
    with pytest.raises(Unable, match="The device failed"):
        admission.admit(ModelFolder(seed), context())
    assert admitted.remembered(ModelFolder(seed)) is None


def test_a_verdict_is_kept_until_a_library_changes(seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = admission.admit(ModelFolder(seed), context())
    monkeypatch.setattr(parity, "run", lambda *given: pytest.fail("computed again"))
    assert admission.admit(ModelFolder(seed), context()) == first
    monkeypatch.setattr(admitted, "versions", lambda: {"transformers": "99"})
    assert admitted.remembered(ModelFolder(seed)) is None


def test_a_model_that_was_not_tried_says_how_it_is_and_a_refused_one_stays_out(seed: Path) -> None:
    with pytest.raises(UserError, match="SeedOssForCausalLM is not supported") as error:
        resolve(str(seed), print)
    assert "--try-model" in error.value.fix
    admitted.remember(ModelFolder(seed), admitted.Verdict(architecture="", admitted=False, why="it differs"))
    with pytest.raises(UserError, match="not supported"):
        resolve(str(seed), print)
    with pytest.raises(UserError, match=r"is refused: it differs\."):
        admission.try_model(str(seed), context())


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_it_trains_and_is_exported_and_generates(
    backend: str, seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}", "completion": f"It is {i}{'!' * i}"} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(seed), "--data", "rows.jsonl", "--backend", backend, "--device", "cpu", "--steps", "3"]
    flags += ["--precision", "fp32", "--export", "fused", "--output", "run", "--try-model", "--valid-share", "0.25"]
    run = run_training(load_options(read_flags(flags))[0], context())
    assert Run(run).record.status == "complete"
    assert Run(run).recipe.targets == admitted.remembered(ModelFolder(seed)).targets  # type: ignore[union-attr]
    fused = ModelFolder(run / "fused")
    assert {*fused.tensors} == {*ModelFolder(seed).tensors}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with a tokenizer, and with the key by which mlx-lm reads RoPE's base."""
    folder = write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")).path
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_are_compared_where_they_are_adapted(mixture: Path, tmp_path: Path) -> None:
    verdict = admission.admit(ModelFolder(mixture), context(), experts=True)
    assert (verdict.why, verdict.targets) == ("", ["q_proj", "k_proj", "v_proj", "o_proj", "experts"])
    assert {"gradient of experts, torch", "gradient of experts, mlx"} <= {*verdict.checks}
    refused = admission.admit(write_model("gpt_oss", tmp_path / "gpt_oss"), context(), experts=True)
    assert refused.why.startswith("--targets experts: its files hold its experts as")


def test_a_wrong_gradient_of_experts_is_found(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_backend.experts import LoraExperts

    rows = admission._rows(259)
    found = {}
    added = LoraExperts._added
    for factor in (1.0, 0.5):  # of the gradient; Adam's steps would hide it

        def faulty(*given: Any, factor: float = factor) -> Any:
            right = added(*given)
            return right.detach() + factor * (right - right.detach())

        monkeypatch.setattr(LoraExperts, "_added", faulty)
        with parity.loaded("torch", context().backends, mixture, ["all-linear", "experts"]) as (backend, _, start):
            found[factor] = admission._derivative_error(backend, start, rows, experts=True)
    assert found[1.0] < 0.01
    assert found[0.5] > admission._WITH_EXPERTS


def test_experts_train_alike_and_mlx_lm_and_peft_read_the_adapter(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx
    import torch
    from mlx_lm import load
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "experts"]
    admitted.remember(
        ModelFolder(mixture), admitted.Verdict(architecture="", admitted=True, targets=targets), experts=True
    )
    write_rows(Path("rows.jsonl"), 12)
    runs = {}
    for name in ("torch", "mlx"):
        flags = ["--model", str(mixture), "--data", "rows.jsonl", "--backend", name, "--device", "cpu", "--steps", "4"]
        flags += ["--precision", "fp32", "--export", "fused", "--output", name, "--rank", "4"]
        flags += ["--learning-rate", "2e-3", "--targets", "all-linear", "experts"]
        runs[name] = run_training(load_options(read_flags(flags))[0], context())
    assert Run(runs["torch"]).recipe.hash() == Run(runs["mlx"]).recipe.hash()
    one, other = (Run(run).read_report_facts().experts.model_dump() for run in runs.values())
    for when in ("before", "after"):  # an expert more or less for a token whose scores are equal up to rounding
        assert [*one[when]] == [*other[when]] == [0, 1, 2, 3]
        assert all(np.abs(np.array(one[when][i]) - other[when][i]).sum() <= 4 for i in range(4))
    one, other = (read_peft(run / "adapter").arrays() for run in runs.values())
    assert max(admission._distance(one[name], array) for name, array in other.items()) < backends.FIRST_STEPS
    ids = list(range(5, 60))

    def logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
        with torch.no_grad():
            return model.eval()(torch.tensor([ids])).logits[0].numpy()

    fused = logits(runs["mlx"] / "fused")
    assert np.abs(fused - logits(mixture)).max() > 0.05
    np.testing.assert_allclose(logits(mixture, runs["mlx"] / "adapter"), fused, atol=1e-4)
    model = load(str(mixture), adapter_path=str(runs["mlx"] / "adapter-mlx"))[0]
    np.testing.assert_allclose(np.array(model(mx.array(ids)[None])[0]), fused, atol=1e-4)


def test_layers_that_predict_several_tokens_at_once_are_not_adapted(tmp_path: Path) -> None:
    model = write_model("seed_oss", tmp_path / "seed_oss")
    before, file = linear_shapes(model, ["all-linear"]), model.path / "model.safetensors"
    tensors = load_file(file)
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    for name in ("mtp.layers.0.self_attn.q_proj.weight", "model.layers.4.self_attn.q_proj.weight"):
        tensors[name] = query.copy()
    save_file(tensors, file, metadata={"format": "pt"})
    assert linear_shapes(ModelFolder(model.path), ["all-linear"]) == before


def test_what_is_not_possible_yet_is_said(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = admitted.Verdict(architecture="SeedOssForCausalLM", admitted=True, targets=["q_proj"])
    admitted.remember(ModelFolder(seed), verdict)
    for flags, said in {
        "--quantization 4bit": "--quantization is not",
        "--targets mlp": "--targets mlp: none is",
    }.items():
        options = load_options(read_flags(["--model", str(seed), *flags.split()]))[0]
        with pytest.raises(UserError, match=said):
            find_base(options, "torch", "nf4" if "4bit" in flags else "none", Display("quiet"))


def test_the_first_layers_hold_one_of_each_kind(tmp_path: Path) -> None:
    model = write_model("lfm2", tmp_path / "lfm2")  # conv, attention, conv, attention
    assert enough_layers(model) == 2
    small = write_first_layers(model, 2, tmp_path / "small")
    assert small.config["layer_types"] == ["conv", "full_attention"]
    kept = [name for name in model.tensors if ".layers." not in name or ".layers.0." in name or ".layers.1." in name]
    assert [*small.tensors] == kept
    name = "model.layers.1.self_attn.q_proj.weight"
    for one, other in zip(model.tensors[name].chunks(), small.tensors[name].chunks(), strict=True):
        assert np.frombuffer(one, np.float32).tolist() == np.frombuffer(other, np.float32).tolist()

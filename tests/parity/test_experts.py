"""What routers choose, counted in both libraries' layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.architectures import write_model
from common.commands.arguments import read_flags
from common.commands.train import run_training
from common.errors import UserError
from common.models import admitted
from common.models.adapter_files import write_peft
from common.models.experts import left_out_by_peft
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.option_sources import load_options
from common.run_record import Run
from common.verify import parity
from tests.contexts import context
from tests.tiny import write_rows, write_tokenizer
from tests.unit.bigram import recipe

ROWS = [np.random.default_rng(number).integers(3, 259, 20 + 17 * number).astype(np.int32) for number in range(4)]
TOKENS = sum(map(len, ROWS))


def loads(model: ModelFolder, targets: list[str]) -> list[dict[int, np.ndarray]]:
    """As torch and as MLX count."""
    found = []
    for name in ("torch", "mlx"):
        with parity.loaded(name, context().backends, model.path, targets) as (backend, _, _):
            before = backend.logits(ROWS[0])
            found.append(backend.expert_load(ROWS))
            assert np.array_equal(backend.logits(ROWS[0]), before)
    return found


# One of each way in which the libraries' modules are called and named.
@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "olmoe", "afmoe", "granitemoe", "nemotron_h", "deepseek_v3", "minimax_m2"]
)
def test_both_backends_count_the_same_choices(kind: str, tmp_path: Path) -> None:
    model = write_model(kind, tmp_path / kind)
    one, other = loads(model, ["q_proj"] if kind != "deepseek_v3" else ["o_proj"])
    layers = {"nemotron_h": [1], "afmoe": [1, 2, 3], "deepseek_v3": [1, 2, 3]}.get(kind, [0, 1, 2, 3])
    assert [*one] == [*other] == layers
    for layer, counts in one.items():
        assert counts.sum() == 2 * TOKENS
        assert len(counts) == 4
        assert np.abs(counts - other[layer]).sum() <= 4  # two experts whose scores are equal up to rounding


def test_experts_with_lora_are_counted_too(tmp_path: Path) -> None:
    model = write_model("qwen3_moe", tmp_path / "qwen3_moe")
    (plain, _), (one, other) = loads(model, ["q_proj"]), loads(model, ["q_proj", "experts"])
    for layer, counts in plain.items():  # the start of an adapter changes nothing
        assert np.array_equal(counts, one[layer])
        assert np.abs(counts - other[layer]).sum() <= 4


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_resumed_run_compares_with_what_was_before_its_first_step(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(admitted, "cache_folder", lambda: tmp_path / "cache")
    model = write_model("olmoe", tmp_path / "olmoe")
    write_tokenizer(model.path)
    admitted.remember(model, admitted.Verdict(architecture="", admitted=True, targets=["q_proj", "o_proj"]))
    write_rows(Path("rows.jsonl"), 12)
    flags = ["--model", str(model.path), "--data", "rows.jsonl", "--backend", backend, "--device", "cpu"]
    flags += ["--precision", "fp32", "--export", "none", "--learning-rate", "1e-2", "--output", "run", "--steps", "2"]
    run, found, loads = Run(Path("run")), [], []
    for words in (flags, ["--resume", "run", "--steps", "4"]):
        run_training(load_options(read_flags(words))[0], context())
        found.append(run.record.experts)
        loads.append(run.read_report_facts().experts)
    assert (found[0].why, found[0].chosen, found[0].experts, found[0].layers) == ("", 2, 4, 4)
    assert found[0].moved > 0
    assert loads[1].before == loads[0].before
    assert loads[1].after != loads[0].after


def test_what_has_no_experts_or_does_not_name_its_choice_is_not_counted(tmp_path: Path) -> None:
    from torch_backend.experts import counted

    model = write_model("seed_oss", tmp_path / "seed_oss")
    for name in ("torch", "mlx"):
        with (
            parity.loaded(name, context().backends, model.path, ["q_proj"]) as (backend, _, _),
            pytest.raises(UserError, match="name no experts that a router chooses"),
        ):
            backend.expert_load(ROWS)
    with pytest.raises(UserError, match="layer 1 does not say"), counted(llama4()) as choices:
        choices.complete()


def llama4() -> Any:
    """Experts that are all given all tokens, each times a score."""
    import torch

    experts = torch.nn.Module()
    experts.num_experts = 4
    layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    layers[1].experts = experts
    return torch.nn.ModuleDict({"layers": layers})


# Their shared experts or dense layers, adapted or not, with experts or without.
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen2_moe", ["all-linear"]),
        ("qwen2_moe", ["o_proj", "experts"]),
        ("deepseek_v3", ["all-linear"]),
        ("deepseek_v3", ["o_proj", "experts"]),
        ("afmoe", ["o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("laguna", ["o_proj", "experts"]),
        ("olmoe", ["all-linear", "experts"]),
        ("mixtral", ["all-linear"]),
    ],
)
def test_what_peft_leaves_out_is_known(kind: str, targets: list[str], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from torch_backend.lora import attach
    from torch_backend.model import load_base

    model = write_model(kind, tmp_path / kind)
    shapes = linear_shapes(model, targets)
    start = initial_adapter(shapes, layer_count(shapes), recipe(rank=4))
    random = np.random.default_rng(0)
    drawn = {n: replace(w, B=random.normal(0, 0.1, w.B.shape).astype(np.float32)) for n, w in start.weights.items()}
    adapter = replace(start, weights=drawn)
    write_peft(tmp_path / "adapter", adapter)

    def logits(of: Any) -> np.ndarray:
        with torch.no_grad():
            return of.eval()(input_ids=torch.from_numpy(ROWS[1])[None].long(), use_cache=False).logits[0].numpy()

    base = load_base(model, torch.float32, attn_implementation=None)
    untuned = logits(base)
    attach(base, adapter)
    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, trust_remote_code=False)
    found = logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")))
    off = np.abs(found - logits(base)).max() / np.abs(logits(base) - untuned).max()
    assert off < 1e-3 or off > 0.1
    assert (off > 0.1) == left_out_by_peft(kind, shapes)

"""Names of experts, an adapter of them in both layouts, and what of it is refused."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.models import adapter_files, admitted
from common.models.adapter_files import names_experts, read_mlx, read_peft, write_both, write_mlx, write_peft
from common.models.adapter_settings import by_pattern
from common.models.experts import MATRICES, by_stack, has_experts, target_of
from common.models.lora_init import initial_adapter, validate
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes, target_names
from common.option_sources import load_options
from tests.unit.bigram import recipe

Q = "model.layers.0.self_attn.q_proj"
COUNT = 11  # so that the order of numbers is not that of texts
SIZES = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
SHAPES = {Q: (8, 4)} | {
    f"model.layers.0.mlp.experts.{number}.{matrix}": SIZES[matrix] for number in range(COUNT) for matrix in MATRICES
}


def expert(number: int, matrix: str = "up_proj") -> str:
    return f"model.layers.0.mlp.experts.{number}.{matrix}"


def adapter(alpha_of_q: float = 4.0) -> Adapter:
    random = np.random.default_rng(0)
    weights = {
        name: LoraWeight(
            random.normal(size=(2, into)).astype(np.float32),
            random.normal(size=(out, 2)).astype(np.float32),
            alpha_of_q if name == Q else 4.0,
        )
        for name, (out, into) in SHAPES.items()
    }
    return Adapter("some/model", 1, 0.0, weights)


def folder(path: Path, tensors: dict[str, tuple[int, ...]]) -> ModelFolder:
    path.mkdir()
    config = {"architectures": ["OlmoeForCausalLM"], "num_hidden_layers": 1, "hidden_size": 4, "vocab_size": 8}
    (path / "config.json").write_text(json.dumps(config))
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, path / "model.safetensors", {"format": "pt"})
    return ModelFolder(path)


def test_targets_name_experts_apart(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    tensors |= {"model.layers.0.mlp.gate.weight": (COUNT, 4), "model.layers.0.mlp.shared_expert.up_proj.weight": (6, 4)}
    model = folder(tmp_path / "model", tensors)
    shared = "model.layers.0.mlp.shared_expert.up_proj"
    assert linear_shapes(model, ["all-linear"]).keys() == {Q, shared}
    assert linear_shapes(model, ["all-linear", "experts"]).keys() == {*SHAPES, shared}
    assert linear_shapes(model, ["experts"]).keys() == {*SHAPES} - {Q}
    assert linear_shapes(model, ["up_proj"]).keys() == {shared}
    assert target_names(SHAPES) == ["q_proj", "experts"]
    assert (target_of(expert(3)), target_of(shared), has_experts([shared])) == ("experts", "up_proj", False)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model.layers.0.mlp.up_proj.weight": (6, 4)}, "the model has no experts"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (2, 4, 12)}, r"experts\.gate_up_proj"),
        ({"model.layers.0.block_sparse_moe.input_linear.weight": (2, 12, 4)}, r"input_linear\.weight"),
        ({"model.layers.0.block_sparse_moe.experts.0.w1.weight": (6, 4)}, r"experts\.0\.w1\.weight"),
        ({"model.layers.0.mlp.experts.0.up_proj.weight": (6, 4)}, r"experts\.0\.up_proj\.weight"),
    ],
)
def test_experts_in_another_form_are_refused(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    model = folder(tmp_path / "model", {f"{Q}.weight": (8, 4), **tensors})
    with pytest.raises(UserError, match=f"--targets experts: .*{said}"):
        linear_shapes(model, ["all-linear", "experts"])


def test_both_layouts_hold_the_same_adapter(tmp_path: Path) -> None:
    given = adapter(alpha_of_q=12.0)  # mlx-lm has one scale: the other goes into B
    write_both(tmp_path, given)
    stored = load_file(tmp_path / "adapter-mlx" / "adapters.safetensors")
    stack = "model.layers.0.mlp.switch_mlp.up_proj"
    assert stored[f"{stack}.lora_a"].shape == (COUNT, 2, 4)
    assert stored[f"{stack}.lora_b"].shape == (COUNT, 6, 2)
    assert np.array_equal(stored[f"{stack}.lora_a"][10], given.weights[expert(10)].A)
    assert read_mlx(tmp_path / "adapter-mlx", 1).weights.keys() == given.weights.keys()
    assert f"base_model.model.{expert(10)}.lora_A.weight" in load_file(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("inside", ["adapter", "adapter-mlx"])
def test_the_names_tell_an_adapter_of_experts_and_no_weight_is_read(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = adapter()
    write_both(tmp_path / "experts", given)
    write_both(tmp_path / "plain", replace(given, weights={Q: given.weights[Q]}))
    monkeypatch.setattr(adapter_files, "load_tensors", lambda *_: pytest.fail("weights are read"))
    assert names_experts(tmp_path / "experts" / inside)
    assert not names_experts(tmp_path / "plain" / inside)
    with pytest.raises(UserError, match="holds no adapter"):
        names_experts(tmp_path)


def test_ranks_by_name_are_read_back_as_names_and_not_as_expressions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of experts times hundreds of patterns would take longer than reading may."""
    names = [*SHAPES]
    config = {"rank_pattern": {Q: 4, expert(1): 2}}
    monkeypatch.setitem(sys.modules, "regex", None)
    found = by_pattern(Path("config"), "rank_pattern", config, names, 8)
    assert [found[Q], found[expert(1)], found[expert(10)]] == [4, 2, 8]


def test_experts_of_a_layer_share_rank_and_scale() -> None:
    shared = recipe(rank_pattern={"experts.*": 3})
    assert {w.rank for name, w in initial_adapter(SHAPES, 1, shared).weights.items() if name != Q} == {3}
    with pytest.raises(UserError, match="its experts differ in rank or scale"):
        initial_adapter(SHAPES, 1, recipe(rank_pattern={"experts.3.up_proj": 3}))


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        (lambda name: name == expert(10), "adapts 10 of 11 experts"),
        (lambda name: name == expert(4), "some of its experts are not adapted"),
        (lambda name: name.endswith("up_proj"), "up_proj of its experts is not adapted"),
    ],
)
def test_an_adapter_of_some_experts_is_refused(left_out: Callable[[str], bool], said: str) -> None:
    given = adapter()
    weights = {name: weight for name, weight in given.weights.items() if not left_out(name)}
    with pytest.raises(UserError, match=said):
        validate(replace(given, weights=weights), SHAPES, Path("adapter"))


def test_what_mlx_lm_cannot_hold_stays_in_pefts_layout(tmp_path: Path) -> None:
    given = adapter()
    some = replace(given, weights={name: w for name, w in given.weights.items() if name != expert(4)})
    write_peft(tmp_path / "peft", some)
    assert read_peft(tmp_path / "peft").weights.keys() == some.weights.keys()
    with pytest.raises(UserError, match="no matrices of some experts"):
        write_mlx(tmp_path / "mlx", some)
    assert not (tmp_path / "mlx").exists()


def test_dora_of_experts_is_refused() -> None:
    with pytest.raises(UserError, match="targets experts cannot be combined with method dora"):
        load_options({"model": "m", "data": "d", "targets": ["all-linear", "experts"], "method": "dora"})


def test_a_verdict_with_experts_holds_without_them_and_not_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admitted, "cache_folder", lambda: tmp_path / "cache")
    model = folder(tmp_path / "model", {f"{Q}.weight": (8, 4)})
    plain = admitted.Verdict(architecture="", admitted=True, targets=["q_proj"])
    admitted.remember(model, plain)
    assert admitted.remembered(model, experts=True) is None
    admitted.remember(model, plain.model_copy(update={"admitted": False, "why": "it differs"}), experts=True)
    assert admitted.remembered(model) == plain
    other = folder(tmp_path / "other", {f"{Q}.weight": (8, 5)})
    admitted.remember(other, plain, experts=True)
    assert admitted.remembered(other) == plain


def test_stacks_are_in_the_order_of_numbers() -> None:
    members = by_stack(sorted(SHAPES))["model.layers.0.mlp.experts.up_proj"]
    assert members == [expert(number) for number in range(COUNT)]

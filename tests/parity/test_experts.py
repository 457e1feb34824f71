"""What routers choose, counted in both libraries' layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.architectures import write_model
from common.errors import UserError
from common.models.model_folder import ModelFolder
from common.verify import parity
from tests.contexts import context

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

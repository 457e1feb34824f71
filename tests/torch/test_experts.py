"""LoRA on the experts of a mixture: what it computes, and that it can be switched off and taken out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.architectures import write_model
from common.backend import Adapter
from common.models.fuse import fuse_block
from common.models.lora_init import initial_adapter, layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from tests.unit.bigram import recipe
from torch_backend.lora import attach
from torch_backend.model import load_base, plain_layers

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def adapter(base: ModelFolder) -> Adapter:
    shapes = linear_shapes(base, ["experts"])
    start = initial_adapter(shapes, layer_count(shapes), recipe(rank_pattern={"down_proj": 3}))
    random = np.random.default_rng(0)
    drawn = {n: random.normal(0, 0.05, weight.B.shape).astype(np.float32) for n, weight in start.weights.items()}
    return replace(start, weights={n: replace(weight, B=drawn[n]) for n, weight in start.weights.items()})


def loaded(base: ModelFolder) -> Any:
    return load_base(base, torch.float32, attn_implementation=None).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_the_libraries_layers_are_named_as_in_the_files(base: ModelFolder) -> None:
    found = plain_layers(base)
    for module, shape in linear_shapes(base, ["all-linear", "experts"]).items():
        assert found[module.split("layers.", 1)[1]] == shape


def test_it_computes_what_fused_experts_do_and_can_be_taken_out(base: ModelFolder, adapter: Adapter) -> None:
    model, fused = loaded(base), loaded(base)
    untuned = logits(model)
    for name, weight in adapter.weights.items():
        layer, number, matrix = name.rsplit(".", 2)
        stack = dict(fused.named_modules())[layer]
        half = stack.gate_up_proj.shape[1] // 2
        stored = stack.down_proj if matrix == "down_proj" else stack.gate_up_proj
        rows = slice(half, None) if matrix == "up_proj" else slice(0, half if matrix == "gate_proj" else None)
        block = stored.data[int(number), rows]
        block.copy_(torch.from_numpy(fuse_block(block.numpy().copy(), weight, slice(None))))
    peft, parameters = attach(model, adapter)
    assert parameters.keys() == adapter.arrays().keys()
    tuned = logits(model)
    assert (tuned - untuned).abs().max() > 0.1
    torch.testing.assert_close(tuned, logits(fused), atol=1e-5, rtol=0)
    with peft.disable_adapter():
        torch.testing.assert_close(logits(model), untuned, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(model), tuned, atol=0, rtol=0)
    peft.unload()
    torch.testing.assert_close(logits(model), untuned, atol=0, rtol=0)


def test_only_experts_that_a_token_came_to_have_gradients_and_the_router_has_none(
    base: ModelFolder, adapter: Adapter
) -> None:
    model = loaded(base)
    _, parameters = attach(model, adapter)
    chosen: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, given, name=name: chosen.__setitem__(name, {*given[1].flatten().tolist()})
            )
    model(input_ids=IDS[:, :1], use_cache=False).logits.square().sum().backward()  # one token: two of four experts
    for name, parameter in parameters.items():
        layer, number = name.split(".experts.")[0], int(name.split(".experts.")[1].split(".")[0])
        hit = number in chosen[f"{layer}.experts"]
        assert (parameter.grad is not None and bool(parameter.grad.any())) == hit
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_experts." in n
    }

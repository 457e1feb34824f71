"""PEFT reads what Twintune writes, and Twintune what PEFT writes: the same logits, for every method."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.models.adapter_files import read_any, write_both
from common.models.families import is_multimodal
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from tests import backends
from tests.backends import METHODS
from tests.tiny import MULTIMODAL, write_family, write_rows


@pytest.fixture(scope="module")
def rows(tiny_llama, tmp_path_factory):
    return backends.encode_rows(tiny_llama, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model, rows):
    return model.eval()(input_ids=torch.from_numpy(rows[0].ids).long()[None]).logits[0].numpy()


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_peft_loads_an_adapter_of_ours(tiny_llama, rows, tmp_path, changes):
    recipe = backends.make_recipe(tiny_llama, **changes)
    backend = backends.load("torch", tiny_llama, recipe)
    backends.run_steps(backend, recipe, rows, 3)
    write_both(tmp_path, backend.get_adapter())
    expected = backend.logits(rows[0].ids)
    backend.close()
    found = logits(PeftModel.from_pretrained(base(tiny_llama), tmp_path / "adapter"), rows)
    assert abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("family", MULTIMODAL)
def test_peft_adapts_the_language_model_of_a_multimodal_one(family, rows, tmp_path):
    """Whatever the model's files call its modules; by the class that the model card names."""
    folder = write_family(tmp_path / "base", family, older=family == "qwen2_5_vl")
    model, targets = ModelFolder(folder), ["v_proj", "down_proj"]
    random = np.random.default_rng(0)
    weights = {
        name: LoraWeight(*(random.normal(0, 0.2, size).astype(np.float32) for size in ((2, into), (out, 2))), 4.0)
        for name, (out, into) in linear_shapes(model, targets).items()
    }
    adapter = Adapter("some/base", model.config["num_hidden_layers"], 0.0, weights)
    write_both(tmp_path, adapter, is_multimodal(model.written_config))
    assert read_any(tmp_path / "adapter").weights.keys() == read_any(tmp_path / "adapter-mlx").weights.keys()
    assert read_any(tmp_path / "adapter").weights.keys() == weights.keys()
    backend = backends.create("torch")
    backend.load(backends.make_recipe(folder, targets=targets), backends.make_plan("torch"), folder, adapter)
    expected = backend.logits(rows[0].ids)
    backend.close()
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert abs(logits(whole, rows) - expected).max() > 1e-2
    found = logits(PeftModel.from_pretrained(whole, tmp_path / "adapter"), rows)
    assert abs(found - expected).max() < 1e-4


def write_pefts_own(tiny_llama, rows, folder, **settings):
    """An adapter as PEFT makes and saves it, with random matrices; its logits."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base(tiny_llama), LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1.1)
    model.save_pretrained(folder)
    return logits(model, rows)


PEFTS_OWN = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 9}},
    "layers": {"layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("settings", PEFTS_OWN.values(), ids=PEFTS_OWN)
def test_an_adapter_of_pefts_is_gone_on_with(tiny_llama, rows, tmp_path, settings):
    expected = write_pefts_own(tiny_llama, rows, tmp_path / "theirs", **settings)
    adapter = read_any(tmp_path / "theirs", 2)
    recipe = backends.make_recipe(tiny_llama)
    for name in ("torch", "mlx"):
        backend = backends.create(name)
        backend.load(recipe, backends.make_plan(name), tiny_llama, adapter)
        assert abs(backend.logits(rows[0].ids) - expected).max() < 1e-4, name
        losses = backends.run_steps(backend, recipe, rows, 4)
        assert losses[-1] < losses[0]
        backend.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": "lora_only"}, "biases were trained"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is not a LoRA matrix of a linear layer"),
        ({"lora_bias": True}, "lora_bias is set"),
    ],
)
def test_what_twintune_does_not_compute_is_refused_by_name(tiny_llama, rows, tmp_path, settings, words):
    write_pefts_own(tiny_llama, rows, tmp_path / "theirs", **settings)
    with pytest.raises(UserError, match=words):
        read_any(tmp_path / "theirs", 2)

"""The torch backend on a tiny random model."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import torch_backend.backend as backend_module
import torch_backend.forward as forward_module
from common.backend import OptimizerState
from common.data.batching import make_batch
from common.errors import UserError
from tests import backends
from tests.backends import METHODS, QUANTIZED
from tests.tiny import write_family, write_model, write_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def test_how_a_step_is_cut_does_not_change_it(model, rows):
    backends.check_cutting_changes_nothing("torch", model, rows)


def test_loss_and_gradient_of_weighted_labels_are_those_of_a_plain_loop(model, rows):
    backends.check_loss_weights("torch", model, rows)


def test_checkpointing_of_a_model_that_has_none_is_an_error(model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    recipe = backends.make_recipe(model)
    with pytest.raises(UserError, match="no gradient checkpointing for LlamaForCausalLM") as error:
        backends.load("torch", model, recipe, gradient_checkpointing=True)
    assert "--gradient-checkpointing false" in error.value.fix
    backends.load("torch", model, recipe).close()


def test_only_the_ratio_of_weights_counts(model, rows):
    backends.check_equal_weights("torch", model, rows)


@pytest.mark.parametrize(
    ("family", "changes", "spared"),
    [
        ("llama", {}, set()),
        ("llama", {"method": "dora", "lora_plus": 2.0}, {"magnitude"}),
        ("qwen2", {"method": "full"}, {"weight", "bias"}),
        ("gemma3", {"method": "full"}, {"weight"}),
    ],
)
def test_weight_decay_spares_norms_biases_embeddings_and_magnitudes(family, changes, spared, tmp_path):
    folder = write_family(tmp_path / "model", family)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    found = backends.check_what_weight_decay_spares("torch", folder, rows, **changes)
    assert {key.rsplit(".", 1)[-1] for key in found} == spared


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_fused_logits_equal_adapter_logits(model, rows, tmp_path, changes):
    backends.check_fused_equals_adapter("torch", model, rows, tmp_path / "fused", **changes)


def test_full_fine_tuning_is_fused_completely(model, rows, tmp_path):
    backends.check_full_fusion("torch", model, rows, tmp_path / "fused")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_base_trains_and_fuses(model, rows, tmp_path, scheme):
    backends.check_quantized_base("torch", model, rows, scheme, tmp_path / "fused")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("family", QUANTIZED)
def test_a_quantized_base_of_a_family_whose_layers_are_others(family, scheme, tmp_path):
    folder = write_family(tmp_path / "model", family)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    backends.check_quantized_base("torch", folder, rows, scheme, tmp_path / "fused")


def test_without_its_adapter_the_model_is_the_base(model, rows):
    backends.check_adapter_off_is_the_base("torch", model, rows)


def test_gradients_are_clipped(model, rows):
    backends.check_clipping("torch", model, rows)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(model, rows, tmp_path, dropout):
    backends.check_resume_is_bit_identical("torch", model, rows, tmp_path, dropout)


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"quantization": "nf4"}], ids=str)
def test_an_exchanged_adapter_trains_as_a_loaded_one(model, rows, changes):
    backends.check_an_exchanged_adapter_trains_as_a_loaded_one("torch", model, rows, **changes)


@pytest.mark.cpu
def test_an_evaluation_leaves_weights_in_4_bits_as_they_are(model, rows, monkeypatch):
    """On a CPU with avx512_bf16 bitsandbytes would change their layout. PEFT calls its layers where we have none."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("torch_backend.trained.install", lambda model, adapter: [])
    backend = backends.load("torch", model, backends.make_recipe(model, quantization="nf4"))
    stored = [layer for layer in backend.model.modules() if type(layer).__name__ == "Linear4bit"]
    before = [layer.weight.data.clone() for layer in stored]
    backend.eval_step(make_batch(rows[:4]))
    assert stored
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(stored, before, strict=True))


def test_optimizer_state_leaves_a_backend_and_comes_back(model, rows):
    backends.check_optimizer_state_round_trip("torch", model, rows)


def test_the_adapter_of_a_bf16_base_is_trained_in_float32(model, rows):
    backends.check_bf16_base_has_float32_adapter("torch", model, rows)


def test_running_out_of_memory_is_raised_and_the_step_can_be_repeated(model, rows, monkeypatch):
    backends.check_out_of_memory_is_raised("torch", model, rows, monkeypatch)


def test_a_gemma_stored_in_bf16_is_scaled_in_float32(tmp_path):
    import json

    import ml_dtypes
    from safetensors.numpy import load_file, save_file
    from transformers import AutoModelForCausalLM

    from common.verify.tiny_models import write_tiny

    folder = write_tiny(tmp_path / "model", "gemma3_text", {"hidden_size": 40, "intermediate_size": 64})
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    ids = np.arange(3, 50)
    backend = backends.load("torch", folder, backends.make_recipe(folder))
    logits = backend.logits(ids)
    backend.close()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_closed_backend_holds_no_model(model):
    import gc

    backend = backends.load("torch", model, backends.make_recipe(model))
    shape = backend.model.model.embed_tokens.weight.shape
    backend.close()
    gc.disable()
    try:
        alive = [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and o.shape == shape]
    finally:
        gc.enable()
    assert alive == []


def asked_of(found: Any) -> list[Any]:
    """All that is in an answer: an array is read when it is asked for."""
    return list(found.exp_avg.values() if isinstance(found, OptimizerState) else found)


@pytest.mark.parametrize("asked", ["get_adapter", "get_optimizer", "logits", "generate", "eval_step"])
def test_a_gpus_late_fault_is_said_at_whatever_is_asked_next(model, rows, monkeypatch, asked):
    backend = backends.load("torch", model, backends.make_recipe(model))

    def fault(*arguments, **more):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(backend_module, "to_numpy", fault)
    monkeypatch.setattr(backend.optimizer, "moment", fault)
    monkeypatch.setattr(backend.model, "forward", fault)
    monkeypatch.setattr(forward_module, "loss_sum", fault)
    given = {
        "logits": (rows[0].ids,),
        "generate": (rows[0].ids, 1, [], lambda logits, ids: 0),
        "eval_step": (make_batch(rows[:1]),),
    }
    with pytest.raises(UserError, match=r"^The device failed: CUDA error: an illegal memory access was encountered\n"):
        asked_of(getattr(backend, asked)(*given.get(asked, ())))

"""The mlx backend on a tiny random model."""

import gc
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from common.data.batching import make_batch
from common.system.memory import total
from mlx_backend import backend as backend_module
from tests import ROOT, backends
from tests.backends import METHODS, QUANTIZED
from tests.tiny import write_family, write_model, write_rows, write_tiny
from tests.unit.bigram import row

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def test_how_a_step_is_cut_does_not_change_it(model, rows):
    backends.check_cutting_changes_nothing("mlx", model, rows)


def test_loss_and_gradient_of_weighted_labels_are_those_of_a_plain_loop(model, rows):
    backends.check_loss_weights("mlx", model, rows)


def test_only_the_ratio_of_weights_counts(model, rows):
    backends.check_equal_weights("mlx", model, rows)


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
    found = backends.check_what_weight_decay_spares("mlx", folder, rows, **changes)
    assert {key.rsplit(".", 1)[-1] for key in found} == spared


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_fused_logits_equal_adapter_logits(model, rows, tmp_path, changes):
    backends.check_fused_equals_adapter("mlx", model, rows, tmp_path / "fused", **changes)


def test_full_fine_tuning_is_fused_completely(model, rows, tmp_path):
    backends.check_full_fusion("mlx", model, rows, tmp_path / "fused")


@pytest.mark.parametrize("scheme", ["mlx-4bit-64", "mlx-8bit-64"])
def test_a_quantized_base_trains_and_fuses(model, rows, tmp_path, scheme):
    backends.check_quantized_base("mlx", model, rows, scheme, tmp_path / "fused")


@pytest.mark.parametrize("family", QUANTIZED)
def test_a_quantized_base_of_a_family_whose_layers_are_others(family, tmp_path):
    folder = write_family(tmp_path / "model", family)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    backends.check_quantized_base("mlx", folder, rows, "mlx-4bit-32", tmp_path / "fused")


def test_without_its_adapter_the_model_is_the_base(model, rows):
    backends.check_adapter_off_is_the_base("mlx", model, rows)


def test_gradients_are_clipped(model, rows):
    backends.check_clipping("mlx", model, rows)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(model, rows, tmp_path, dropout):
    backends.check_resume_is_bit_identical("mlx", model, rows, tmp_path, dropout)


@pytest.mark.parametrize("most", [1, 500])  # values: each array by itself, and a few together
def test_an_adapter_in_several_tensors_is_trained_as_in_one(model, rows, tmp_path, monkeypatch, most):
    recipe, found = backends.make_recipe(model), []
    for values in (2**20, most):
        monkeypatch.setattr("mlx_backend.trained._MOST", values)
        backend = backends.load("mlx", model, recipe)
        losses = backends.run_steps(backend, recipe, rows, 3)
        found.append((len(backend.tensors), losses, backends.matrices(backend)))
        backend.close()
    (one, expected, matrices), (parts, losses, others) = found
    assert (one, parts > 1) == (1, True)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert backends.relative_difference(matrices, others) < 1e-5
    backends.check_clipping("mlx", model, rows)
    backends.check_optimizer_state_round_trip("mlx", model, rows)
    backends.check_resume_is_bit_identical("mlx", model, rows, tmp_path, 0.1)


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"quantization": "mlx-4bit-64"}], ids=str)
def test_an_exchanged_adapter_trains_as_a_loaded_one(model, rows, changes):
    backends.check_an_exchanged_adapter_trains_as_a_loaded_one("mlx", model, rows, **changes)


def test_optimizer_state_leaves_a_backend_and_comes_back(model, rows):
    backends.check_optimizer_state_round_trip("mlx", model, rows)


def test_the_adapter_of_a_bf16_base_is_trained_in_float32(model, rows):
    backends.check_bf16_base_has_float32_adapter("mlx", model, rows)


def test_running_out_of_memory_is_raised_and_the_step_can_be_repeated(model, rows, monkeypatch):
    backends.check_out_of_memory_is_raised("mlx", model, rows, monkeypatch)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"lora_plus": 4.0}], ids=str)
def test_nothing_within_a_step_waits_for_the_device(model, rows, monkeypatch, changes):
    """Of all that makes MLX wait, only numpy's reading of an array's buffer would go unseen. A GPU's steps may wait."""
    backend = backends.load("mlx", model, backends.make_recipe(model, **changes), device="cpu")
    batches = [make_batch(rows[:3]), make_batch(rows[3:4])]
    backend.train_step(batches, 1e-3, 1)
    waits = []

    def watch(owner, name):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: waits.append(name) or plain(*arguments))

    for name in ("item", "tolist", "__float__", "__int__", "__index__", "__bool__", "__array__", "__dlpack__"):
        watch(mx.array, name)
    for name in ("eval", "synchronize"):
        watch(mx, name)
    result = backend.train_step(batches, 1e-3, 2)
    assert waits == []
    float(result.loss_sum)
    assert waits == ["__float__"]
    backend.close()


def test_a_checkpointed_layer_draws_its_dropout_masks_twice_alike(tiny_llama, tmp_path):
    """The gradient is that of the loss that was computed: by differences along it, in float32."""
    from common.data.batching import make_batch

    recipe = backends.make_recipe(tiny_llama, dropout=0.4)
    backend = backends.load("mlx", tiny_llama, recipe, gradient_checkpointing=True)
    rows = backends.encode_rows(tiny_llama, write_rows(tmp_path / "rows.jsonl"))
    backends.run_steps(backend, recipe, rows, 3)  # B is zero at the start, and A without influence
    backend.model.train()
    (inputs,), key = backend.forward.inputs(make_batch(rows[:4]), backend.layouts), mx.random.key(7)
    there = backend.tensors

    def loss(shift):
        tensors = [p + shift * g for p, g in zip(there, direction, strict=True)]
        return backend.gradient(tensors, inputs, key)[0].item()

    direction = backend.gradient(there, inputs, key)[1]
    length = sum(float(mx.square(g).sum()) for g in direction) ** 0.5
    step = 0.02 / length
    derivative = (loss(step) - loss(-step)) / (2 * step)
    assert abs(derivative / length**2 - 1) < 0.02
    backend.close()


def test_the_limit_is_never_raised_above_mlxs_own(model):
    before = mx.get_memory_limit()
    backend = backends.load("mlx", model, backends.make_recipe(model), memory_budget=before * 2)
    assert mx.get_memory_limit() == before
    backend.close()
    backend = backends.load("mlx", model, backends.make_recipe(model), memory_budget=before // 2)
    assert mx.get_memory_limit() == before // 2
    backend.close()
    assert mx.get_memory_limit() == before


def test_a_load_that_fails_leaves_mlx_as_it_was(model, monkeypatch):
    def fails(*given):
        raise RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes.")

    before = mx.get_memory_limit(), mx.default_device()
    monkeypatch.setattr(backend_module, "load_base", fails)
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        backends.load("mlx", model, backends.make_recipe(model), memory_budget=10**9)
    assert (mx.get_memory_limit(), mx.default_device()) == before


@pytest.mark.parametrize("off", [False, True])
def test_compiling_is_turned_on_again_only_where_it_was_on(model, monkeypatch, off):
    turned = []
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    if off:
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    monkeypatch.setattr(mx, "disable_compile", lambda: turned.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: turned.append("on"))
    backends.load("mlx", model, backends.make_recipe(model), device="cpu").close()
    assert turned == ([] if off else ["off", "on"])
    monkeypatch.setattr(mx, "gpu", mx.cpu)
    backends.load("mlx", model, backends.make_recipe(model), device="gpu").close()
    assert turned == ([] if off else ["off", "on"])


def test_no_array_is_made_on_the_default_device_before_it_is_chosen():
    """MLX for CUDA names a GPU where none is seen."""
    code = (
        "import mlx.core as mx, mlx_lm.tuner\n"
        "def made(*given, stream=None, **more):\n"
        "    assert stream == mx.cpu\n"
        "    return zeros(*given, stream=stream, **more)\n"
        "zeros, mx.zeros = mx.zeros, made\n"
        "import mlx_backend.backend\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_of_an_nvidia_gpu_its_own_memory_is_told(model, monkeypatch):
    def memory():
        backend = backends.load("mlx", model, backends.make_recipe(model), device="gpu")
        found = backend.memory()
        backend.close()
        return found.total, found.kind

    monkeypatch.setattr(mx, "gpu", mx.cpu)
    assert memory() == (total(), "unified")
    monkeypatch.setattr(mx, "device_info", lambda device: {"total_memory": 141 * 10**9, "free_memory": 10**9})
    assert memory() == (141 * 10**9, "cuda")
    monkeypatch.setattr(mx, "device_info", lambda device: {"memory_size": 36 * 2**30})  # Metal's
    assert memory() == (total(), "unified")


def test_tf32_is_off_unless_the_user_wants_it():
    code = "import mlx_backend, os; print(os.environ['MLX_ENABLE_TF32'])"
    for given, found in ((None, "0"), ("1", "1")):
        env = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
        env |= {} if given is None else {"MLX_ENABLE_TF32": given}
        ran = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT, check=True
        )
        assert ran.stdout.strip() == found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_weights_before_a_step_are_not_kept_beside_those_after_it(model, rows, method):
    recipe = backends.make_recipe(model, method=method, rank=64, alpha=64.0)
    backend = backends.load("mlx", model, recipe)
    size = sum(tensor.nbytes for tensor in backend.tensors)
    before = mx.get_active_memory() + size  # of AdamW's two moments there is one until the first step: zeros
    backends.run_steps(backend, recipe, rows, 2)
    gc.collect()
    assert mx.get_active_memory() < before + size // 4
    backend.close()


def test_a_checkpointed_layer_is_freed_before_the_next_is_recomputed(tmp_path):
    """All that twelve layers keep is far more than what one does."""
    config = {"num_hidden_layers": 12, "intermediate_size": 256, "tie_word_embeddings": True, "mlp_bias": False}
    write_tiny(tmp_path, "llama", {**config, "max_position_embeddings": 1024})
    batch, peaks = make_batch([row([1 + i % 200 for i in range(801)], 400)]), []
    for checkpointing in (False, True):
        backend = backends.load("mlx", tmp_path, backends.make_recipe(tmp_path), gradient_checkpointing=checkpointing)
        backend.train_step([batch], 1e-2, 1)
        backend.get_adapter()  # waits
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        backend.train_step([batch], 1e-2, 2)
        backend.get_adapter()
        peaks.append(mx.get_peak_memory() - before)
        backend.close()
    assert peaks[1] < 0.3 * peaks[0]

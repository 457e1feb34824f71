"""The hand-written backward passes, each against what it replaces."""

import importlib
import shutil
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.batching import make_batch
from common.verify.tiny_models import write_tiny
from tests import backends
from tests.backends import METHODS
from tests.tiny import FAMILIES, write_family, write_model, write_rows, write_tokenizer
from torch_backend import backend as backend_module
from torch_backend import fused, layers, linear, matmul, trained
from torch_backend.attention import RaggedRows, attend, cu_seqlens
from torch_backend.linear import Copies, FrozenLinear, LoraGroup, LoraLinear
from torch_backend.mlp import Gated, GatedDown, recomputing
from torch_backend.norm import RMSNorm
from torch_backend.rope import Rope, calling_rope

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.device(backends.DEVICE):
        yield


def compared(ours, theirs, *inputs, dtype=torch.float32):
    """Values and gradients of `ours` in `dtype` against `theirs` in float64. inputs: (tensor, its own type or None)."""
    close = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    results = []
    for function, exact in ((ours, False), (theirs, True)):
        leaves = [tensor.to(own or dtype) for tensor, own in inputs]  # both see what rounding leaves
        leaves = [(leaf.double() if exact else leaf).detach().requires_grad_() for leaf in leaves]
        result = function(*leaves)
        (
            result.double()
            * torch.linspace(-1, 1, result.numel(), dtype=torch.float64, device=result.device).view_as(result)
        ).sum().backward()
        results.append([result, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), other, **close)


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """Whose kernels compute; on a CPU Triton's are interpreted."""
    module = importlib.import_module("torch_backend.triton_kernels") if request.param == "triton" else None
    monkeypatch.setattr(fused, "kernels", lambda x: module)


@BOTH
@pytest.mark.parametrize("kind", ["plain", "centered", "late"])
@pytest.mark.parametrize("width", [16, 1000])
@pytest.mark.usefixtures("kernels")
def test_rms_norm(dtype, kind, width):
    weight = torch.randn(width).to(dtype)

    def plain(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + (kind == "centered"))

    compared(lambda x: RMSNorm.apply(x, weight, 1e-6, kind), plain, (torch.randn(2, 5, width) * 3, None), dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_5", "olmo2", "olmo3", "lfm2"])
def test_a_norm_in_bf16_rounds_as_the_one_of_transformers(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = next(name for name in vars(module) if name.endswith("RMSNorm") and "Gated" not in name)
    theirs = getattr(module, name)(64).to(torch.bfloat16)
    theirs.weight.data = torch.randn(64).to(torch.bfloat16)
    x = (torch.randn(3, 64) * 3).to(torch.bfloat16)
    ours = RMSNorm.apply(x, theirs.weight, 1e-6, layers.norm_kind(name))
    assert (ours != theirs(x)).float().mean() < 0.02  # float32 sums in another order


@BOTH
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.usefixtures("kernels")
def test_gated(dtype, gelu):
    def plain(gate, up):
        return (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up

    inputs = (torch.randn(2, 5, 16), None), (torch.randn(2, 5, 16), None)
    compared(lambda gate, up: Gated.apply(gate, up, gelu), plain, *inputs, dtype=dtype)


def lora_layer(base, A, B, magnitude=None, dropout=0.0):
    """As PEFT holds it, at a scale of 0.5."""
    matrices = {"lora_A": SimpleNamespace(weight=A), "lora_B": SimpleNamespace(weight=B)}
    vector = {} if magnitude is None else {"default": SimpleNamespace(weight=magnitude)}
    drops = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    given = {name: {"default": each} for name, each in (matrices | {"lora_dropout": drops}).items()}
    return SimpleNamespace(base_layer=base, scaling={"default": 0.5}, lora_magnitude_vector=vector, **given)


def exact(x, base, A, B, magnitude=None, dropout=0.0, mask=None):
    """What the layer computes, from W + B @ A. DoRA's lengths are constants in its backward pass."""
    weight, change = base.weight.double(), 0.5 * B @ A
    gain = 1.0 if magnitude is None else magnitude / (weight + change).detach().norm(dim=1)
    dropped = x if mask is None else x * mask.view(x.shape) / (1 - dropout)
    result = functional.linear(x, weight) + functional.linear(dropped, change)
    return result * gain + (0 if base.bias is None else base.bias.double())


DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.25])


@pytest.fixture
def masks(monkeypatch):
    """Of all layers that drop, one a shape of their input."""
    found: dict = {}
    draw = LoraGroup.draw_mask

    def drawn(group, flat):
        if flat.shape not in found:
            found[flat.shape] = draw(group, flat)
        return found[flat.shape]

    monkeypatch.setattr(LoraGroup, "draw_mask", drawn)
    return found


@BOTH
@DROPOUT
@pytest.mark.parametrize("widened", [False, pytest.param(True, marks=pytest.mark.cpu)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_linear(dtype, widened, bias, copied, dora, dropout, masks, monkeypatch):
    for module in (matmul, linear):
        monkeypatch.setattr(module, "widened", lambda weight, _: widened and weight.dtype == torch.bfloat16)
    monkeypatch.setattr(matmul, "_BLOCK", 50)  # several blocks
    monkeypatch.setattr(linear, "cpu_computes", lambda _, dtype: not widened and dtype == torch.bfloat16)
    bases = [torch.nn.Linear(12, out, bias=bias).to(dtype).requires_grad_(False) for out in (20, 8)]
    matrices = torch.randn(4, 12), torch.randn(20, 4), torch.randn(3, 12), torch.randn(8, 3)
    magnitudes = (torch.rand(20) + 1, torch.rand(8) + 1) if dora else ()

    def ours(x, A, B, C, D, *magnitudes):
        one, other = magnitudes or (None, None)
        group = LoraGroup([lora_layer(bases[0], A, B, one, dropout), lora_layer(bases[1], C, D, other, dropout)])
        if copied:
            Copies([group], x.dtype)
        first, second = group.output(0, x), group.output(1, x)
        assert group._found is None
        return torch.cat([first, second], -1)

    def plain(x, A, B, C, D, *magnitudes):
        one, other = magnitudes or (None, None)
        (mask,) = masks.values()
        assert (mask is None) == (not dropout)
        given = {"dropout": dropout, "mask": mask}
        return torch.cat([exact(x, bases[0], A, B, one, **given), exact(x, bases[1], C, D, other, **given)], -1)

    inputs = (torch.randn(2, 5, 12), None), *((each, torch.float32) for each in (*matrices, *magnitudes))
    compared(ours, plain, *inputs, dtype=dtype)


@BOTH
@DROPOUT
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.usefixtures("kernels")
def test_gated_down(dtype, gelu, second_time, dora, dropout, masks):
    base = torch.nn.Linear(12, 20).to(dtype)
    trained = torch.randn(4, 12), torch.randn(20, 4), *([torch.rand(20) + 1] if dora else [])

    def ours(gate, up, *trained):
        down = LoraGroup([lora_layer(base, *trained, *([] if dora else [None]), dropout)])
        result = GatedDown.apply(gate, up, gelu, False, down, *trained)
        with recomputing():
            second = GatedDown.apply(gate, up, gelu, True, down, *trained)
            assert torch.equal(GatedDown.apply(gate, up, gelu, False, down, *trained), result)  # a norm follows it
        if dora:  # whose backward pass needs the output
            assert torch.equal(second, result)
            return second if second_time else result
        assert not second.any()  # its product was left out, all that the backward pass needs was not
        return result.detach() + second if second_time else result

    def plain(gate, up, *trained):
        inner = (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up
        return exact(inner, base, *trained, *([] if dora else [None]), dropout, *masks.values())

    inputs = [
        (torch.randn(2, 5, 12), None),
        (torch.randn(2, 5, 12), None),
        *((each, torch.float32) for each in trained),
    ]
    compared(ours, plain, *inputs, dtype=dtype)


def test_a_share_of_the_inputs_is_dropped_in_training_alone_and_the_rest_is_scaled():
    base = torch.nn.Linear(40, 50)
    layer = lora_layer(base, torch.randn(4, 40), torch.randn(50, 4), dropout=0.2)
    group, x = LoraGroup([layer]), torch.ones(2000, 40)
    mask = group.draw_mask(x)
    assert abs(mask.float().mean() - 0.8) < 0.01
    assert group.applied_scale == 0.5 / 0.8
    first, second = (group.output(0, x + 0) for _ in range(2))
    assert not torch.equal(first, second)
    layer.lora_dropout["default"].eval()
    assert (group.draw_mask(x), group.applied_scale) == (None, 0.5)
    evaluated = group.output(0, x)
    assert (evaluated - evaluated[0]).abs().max() < 1e-6
    torch.testing.assert_close(first.mean(0), evaluated[0], rtol=0.05, atol=0.3)


def test_a_gain_is_a_number_where_the_adapter_cancels_the_weight(monkeypatch):
    computed_in_bf16(monkeypatch)
    base = torch.nn.Linear(12, 20, bias=False).to(torch.bfloat16).requires_grad_(False)
    weight = base.weight.float()
    group = LoraGroup([lora_layer(base, torch.eye(12) * 1.003, -1.96 * weight, weight.norm(dim=1))])
    assert group.gain(0, base.weight, torch.float32).isfinite().all()


@pytest.mark.cpu
def test_a_frozen_linear_whose_weight_is_widened(monkeypatch):
    monkeypatch.setattr(matmul, "widened", lambda weight, _: True)
    monkeypatch.setattr(matmul, "_BLOCK", 50)
    weight, bias = torch.randn(20, 12).bfloat16(), torch.randn(20).bfloat16()

    def plain(x):
        return functional.linear(x, weight.double(), bias.double())

    x = (torch.randn(2, 5, 12), None)
    compared(lambda x: FrozenLinear.apply(x, weight, bias), plain, x, dtype=torch.bfloat16)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [(7, 4, 7), (5, 5)])
@pytest.mark.parametrize(
    ("packed", "dtype"),
    [(False, torch.float32), (False, torch.bfloat16), pytest.param(True, torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_attention_is_eager_attention_row_by_row(window, softcap, lengths, packed, dtype):
    if packed and softcap:
        return  # never asked for
    heads, groups, d = 4, 2, 8
    query, key, value = (torch.randn(1, n, sum(lengths), d) for n in (heads, groups, groups))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = RaggedRows(len(lengths), max(lengths), None if real.all() else real.flatten().nonzero()[:, 0])
    if packed:
        rows = RaggedRows(
            len(lengths), max(lengths), None, cu_seqlens(np.array(lengths), torch.device(backends.DEVICE))
        )

    def eager(query, key, value):
        found, start = [], 0
        for length in lengths:
            q, k, v = (part[0, :, start : start + length] for part in (query, key, value))
            k, v = k.repeat_interleave(heads // groups, 0), v.repeat_interleave(heads // groups, 0)
            scores = q @ k.mT * 0.3
            scores = (scores / softcap).tanh() * softcap if softcap else scores
            behind = torch.arange(length)[:, None] - torch.arange(length)
            seen = (behind >= 0) & (behind < (window or length))
            found.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
            start += length
        return torch.cat(found)[None]

    def ours(query, key, value):
        return attend(None, query, key, value, None, 0.3, rows, softcap, window)[0]

    compared(ours, eager, *((part, None) for part in (query, key, value)), dtype=dtype)


@pytest.mark.cpu
@pytest.mark.parametrize("heads", [2, 4])
def test_fewer_key_heads_are_never_repeated(monkeypatch, heads):
    """torch 2.11's kernel computes with them; a newer one must be told."""

    def newer(query, key, value, starts, ends, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert query.shape[1] == key.shape[1] or enable_gqa
        assert key.shape[1] == value.shape[1] == 2
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        return found[0].transpose(0, 1)

    def older(query, key, value, starts, ends, max_q, max_k, *, scale, window_size):
        grouped = query.shape[1] != key.shape[1]
        return newer(
            query, key, value, starts, ends, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=grouped
        )

    query, key, value = (torch.randn(1, n, 6, 8) for n in (heads, 2, 2))
    rows = RaggedRows(1, 6, None, cu_seqlens(np.array([6]), torch.device("cpu")))
    found = []
    for kernel in (newer, older):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        found.append(attend(None, query, key, value, None, 0.3, rows)[0])
    torch.testing.assert_close(*found)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(model, tmp_path_factory):
    return backends.encode_rows(model, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


@pytest.mark.parametrize(
    "changes", [{}, {"targets": ["q_proj"]}, {"precision": "bf16"}, {"quantization": "nf4"}], ids=str
)
def test_a_model_trains_as_it_does_without_them(model, rows, monkeypatch, changes):
    recipe, losses, calls = backends.make_recipe(model, **changes), [], []
    called = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda *a: calls.append(1) or called(*a))
    for install in (layers.install, lambda model, adapter: []):
        monkeypatch.setattr(trained, "install", install)
        calls.clear()
        backend = backends.load("torch", model, recipe)
        losses.append(backends.run_steps(backend, recipe, rows, 6))
        backend.close()
        assert bool(calls) == (install is layers.install)
    np.testing.assert_allclose(*losses, rtol=1e-5 if recipe.precision == "fp32" else 2e-2)
    assert losses[0][-1] < losses[0][0]


def test_dropout_is_drawn_by_the_seed_the_rank_and_the_step(model, rows, monkeypatch):
    drawn, draw = [], LoraGroup.draw_mask
    monkeypatch.setattr(LoraGroup, "draw_mask", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    firsts = []
    for seed, rank, step in [(0, 0, 3), (0, 0, 3), (7, 0, 3), (0, 2, 3), (0, 0, 4)]:
        drawn.clear()
        backend = backends.load("torch", model, backends.make_recipe(model, dropout=0.4, seed=seed))
        backend.accumulate([replace(make_batch(rows[:4]), rank=rank)], 1.0, step)
        backend.close()
        firsts.append(drawn[0])
    assert [torch.equal(firsts[0], other) for other in firsts[1:]] == [True, False, False, False]


@pytest.mark.parametrize(("dropout", "least", "most"), [(1e-6, 1.0, 1.0), (1 - 1e-6, 0.0, 0.001)])
def test_the_smallest_and_the_largest_share(dropout, least, most):
    layer = lora_layer(torch.nn.Linear(40, 50), torch.randn(4, 40), torch.randn(50, 4), dropout=dropout)
    assert least <= LoraGroup([layer]).draw_mask(torch.ones(2000, 40)).float().mean() <= most


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_checkpointed_layer_draws_its_dropout_masks_twice_alike(model, rows, method):
    losses = []
    for checkpointing in (False, True):
        recipe = backends.make_recipe(model, dropout=0.4, method=method)
        backend = backends.load("torch", model, recipe, gradient_checkpointing=checkpointing)
        losses.append(backends.run_steps(backend, recipe, rows, 6))
        backend.close()
    np.testing.assert_allclose(*losses, rtol=1e-6)


def computed_in_bf16(monkeypatch):
    """Whatever this CPU multiplies."""
    for module in (matmul, linear):
        monkeypatch.setattr(module, "widened", lambda weight, _: False)
    monkeypatch.setattr(linear, "cpu_computes", lambda _, dtype: dtype == torch.bfloat16)


def test_products_read_what_was_trained_or_set(model, rows, monkeypatch):
    computed_in_bf16(monkeypatch)
    recipe = backends.make_recipe(model, precision="bf16")
    backend = backends.load("torch", model, recipe)
    untrained = backend.logits(rows[0].ids)
    backends.run_steps(backend, recipe, rows, 2)
    trained, after = backend.get_adapter(), backend.logits(rows[0].ids)
    backend.set_adapter(backend.start)
    np.testing.assert_array_equal(backend.logits(rows[0].ids), untrained)
    backend.set_adapter(trained)
    np.testing.assert_array_equal(backend.logits(rows[0].ids), after)
    assert not np.array_equal(after, untrained)
    backend.close()


class Operations(TorchDispatchMode):
    """Counts what a GPU would start a kernel for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        allocates = "empty" in str(function)
        self.count += not (function.is_view or allocates or "detach" in str(function))
        return found


@pytest.mark.cpu
def test_a_layer_takes_few_operations_and_a_step_casts_all_matrices_at_once(tmp_path, monkeypatch):
    computed_in_bf16(monkeypatch)
    counts = []
    for layers_of_model in (1, 2):
        folder = tmp_path / str(layers_of_model)
        write_tiny(folder, "llama", {"num_hidden_layers": layers_of_model, "mlp_bias": False})
        write_tokenizer(folder)
        backend = backends.load("torch", folder, backends.make_recipe(folder, precision="bf16"))
        batch = make_batch(backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))[:3])
        backend.train_step([batch], 1e-3, 1)
        with Operations() as operations:
            backend.train_step([batch], 1e-3, 2)
        counts.append(operations.count)
        backend.close()
    assert counts[1] - counts[0] <= 168  # 225 when each product cast its matrices, and each layer had its own


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_rotates_as_it_does_without(family, tmp_path, monkeypatch):
    folder = write_family(tmp_path / "model", family)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    losses, calls = [], []
    ours = Rope.forward
    monkeypatch.setattr(Rope, "forward", lambda *a: calls.append(1) or ours(*a))
    for calling in (layers.calling_rope, unwrap):
        monkeypatch.setattr(layers, "calling_rope", calling)
        calls.clear()
        recipe = backends.make_recipe(folder)
        backend = backends.load("torch", folder, recipe)
        losses.append(backends.run_steps(backend, recipe, rows, 3))
        backend.close()
        assert bool(calls) == (calling is not unwrap)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("part", ["self_attn", "input_layernorm", "q_proj"])
def test_a_layer_under_a_name_that_is_not_known_is_an_error_and_no_slow_path(model, part):
    recipe = backends.make_recipe(model)
    backend = backends.load("torch", model, recipe)
    layers.install(backend.model, backend.start)
    for layer in backend.model.model.layers:
        module = layer.self_attn.q_proj if part == "q_proj" else getattr(layer, part)
        if part == "q_proj":
            base = module.base_layer
            base.__class__ = type("Renamed", (type(base),), {})
        else:
            module.__class__ = type("Renamed", (type(module),), {})
    with pytest.raises(AssertionError, match="recognized"):
        layers.install(backend.model, backend.start)
    backend.close()


def test_an_attention_that_rotates_otherwise_is_an_error():
    def forward(self, hidden):
        return hidden

    with pytest.raises(AssertionError, match="does not call apply_rotary_pos_emb"):
        calling_rope(forward)


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, METHODS["dora"]], ids=["plain", "dropout", "dora"])
def test_weights_held_in_16_bits_train_as_the_same_ones_in_32(family, changes, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_family(tmp_path / "16", family)
    halved = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    widened = Path(shutil.copytree(folder, tmp_path / "32"))
    save_file(halved, folder / "model.safetensors", {"format": "pt"})
    save_file({name: w.float() for name, w in halved.items()}, widened / "model.safetensors", {"format": "pt"})
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    losses = []
    for path, held in ((folder, torch.bfloat16), (widened, torch.float32)):
        recipe = backends.make_recipe(path, **changes)
        backend = backends.load("torch", path, recipe)
        assert backend.model.get_input_embeddings().weight.dtype == held
        assert {p.dtype for n, p in backend.model.named_parameters() if "norm" in n} == {torch.float32}
        losses.append(backends.run_steps(backend, recipe, rows, 4))
        backend.close()
    np.testing.assert_allclose(*losses, rtol=1e-5)


class Waits(TorchDispatchMode):
    """Notes what would make the program wait for a device."""

    found: list[str]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "unique", "equal.default")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_within_a_step_waits_for_the_device(model, rows, checkpointing):
    backend = backends.load("torch", model, backends.make_recipe(model), gradient_checkpointing=checkpointing)
    batches = [make_batch(rows[:3]), make_batch(rows[3:4])]
    backend.train_step(batches, 1e-3, 1)
    with Waits() as waits:
        waits.found = []
        result = backend.train_step(batches, 1e-3, 2)
        assert waits.found == []
        float(result.loss_sum)
    assert waits.found != []
    backend.close()


@pytest.mark.cpu
def test_freed_memory_is_trimmed_forward_and_backward_only_where_memory_is_short(model, rows, monkeypatch):
    given = []
    monkeypatch.setattr(backend_module, "malloc_trim", lambda: given.append(1))
    backend = backends.load("torch", model, backends.make_recipe(model), gradient_checkpointing=True)
    batch = make_batch(rows[:2])
    with_gaps = len(backend.model.model.layers[:: backend_module.TRIM_EVERY])
    backend.train_step([batch], 1e-3, 1)
    assert len(given) == 2 * with_gaps  # forward, and again in the backward pass
    backend.eval_step(batch)
    backend.apply_plan(backends.make_plan("torch", gradient_checkpointing=False))
    backend.train_step([batch], 1e-3, 2)
    assert len(given) == 2 * with_gaps
    backend.close()

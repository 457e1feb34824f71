"""Triton's kernels: interpreted on a CPU against torch's own, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.data.batching import make_batch
from common.verify.tiny_models import TINY, write_tiny
from tests import backends
from tests.tiny import write_family, write_model, write_rows, write_tokenizer
from torch_backend import fused, kernel_check
from torch_backend.rope import Rope

triton_kernels = pytest.importorskip("torch_backend.triton_kernels")

pytestmark = pytest.mark.slow
DEVICE = torch.device(backends.DEVICE)


@pytest.fixture
def interpreted(monkeypatch):
    """On a CPU; on a GPU Triton compiles them."""
    monkeypatch.setattr(fused, "kernels", lambda x: fused._kernels)
    monkeypatch.setattr(kernel_check, "_failed", set())
    yield
    fused.use(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [8, 12])  # of 12 values
@pytest.mark.parametrize("heads", [1, 3])
def test_a_rotation_is_the_one_of_torch(dtype, interleaved, rotary, heads, interpreted):
    torch.manual_seed(0)
    x, grad = (torch.randn(1, 5, heads, 12).to(DEVICE, dtype).transpose(1, 2) for _ in range(2))
    cos, sin = (torch.randn(1, 5, rotary // 2).to(DEVICE, dtype).repeat(1, 1, 2) for _ in range(2))
    found = []
    for module in (None, triton_kernels):
        fused.use(module)
        leaf = x.clone().requires_grad_()
        result = Rope.apply(leaf, cos, sin, interleaved)
        result.backward(grad)
        found.append((result.detach(), leaf.grad))
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 3e-2}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma4_text", "glm4", "qwen3_5_text"])
def test_a_model_has_the_gradients_it_has_with_the_kernels_of_torch(family, tmp_path, interpreted, monkeypatch):
    folder = write_family(tmp_path / "model", family)
    whole = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))[0]
    row = replace(whole, ids=whole.ids[-9:], loss_weights=whole.loss_weights[-9:])  # the interpreter is slow
    found, called = [], set()
    for name in ("gated", "gated_grads", "rotated", "rms_norm", "rms_norm_grad"):
        own = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *a, own=own: called.add(own.__name__) or own(*a))
    for module in (None, triton_kernels):
        assert not called
        backend = backends.load("torch", folder, backends.make_recipe(folder))
        fused.use(module)  # loading chooses on a GPU
        called.clear()
        backend.accumulate([make_batch([row])], 1.0, 1)
        found.append({"loss": backend.accumulated_loss()} | backend.gradients())
        backend.close()
    assert len(called) == 5
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


# Run by a process of its own: in this one the kernels are interpreted.
_COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torch_backend import triton_kernels as kernels

POINTERS = {"gate", "up", "result", "grad", "grad_gate", "grad_up", "x", "cos", "sin", "weight"}
VARIANTS = [
    *(("_gated", {"GELU": gelu, "BLOCK": 1024}, 4) for gelu in (False, True)),
    *(("_gated_grads", {"GELU": gelu, "BLOCK": 1024}, 4) for gelu in (False, True)),
    ("_rotated", {"HALF": 64, "SIGN": -1, "STEP": 1, "SECOND": 64, "HEADS": 32, "WIDTH": 128}, 16),
    ("_rotated", {"HALF": 32, "SIGN": 1, "STEP": 2, "SECOND": 1, "HEADS": 2, "WIDTH": 128}, 4),
    *(("_rms_norm", {"EARLY": early, "ROWS": 8, "WIDTH": 128}, 4) for early in (False, True)),
    ("_rms_norm_grad", {"ROWS": 1, "WIDTH": 4096}, 16),
]
for architecture in (75, 80, 90, 120):
    for dtype, weight in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        for name, constants, warps in VARIANTS:
            kernel = getattr(kernels, name)
            types = {"factor": "*fp32", "eps": "fp32", "offset": "fp32", **dict.fromkeys(POINTERS, f"*{dtype}")}
            types["weight"] = f"*{weight}"
            signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
            values = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
            target, source = GPUTarget("cuda", architecture, 32), ASTSource(kernel, signature, values)
            made = compile(source, target=target, options={"num_warps": warps})
            print(architecture, dtype, name, len(made.asm["cubin"]))
"""


def test_every_kernel_compiles_for_nvidia_gpus_from_turing_on(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 4 * 3 * 9


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def sizes(monkeypatch):
    """Of what is computed meanwhile."""
    found = set()

    def recorded(name, size_of):
        own = getattr(triton_kernels, name)
        monkeypatch.setattr(triton_kernels, name, lambda *given: found.add((name, *size_of(*given))) or own(*given))

    recorded("gated", lambda gate, up, gelu: (gate.shape[-1], gelu))
    recorded("rotated", lambda x, cos, sin, sign, interleaved: (x.shape[1], x.shape[3], cos.shape[-1], interleaved))
    recorded("rms_norm", lambda x, weight, eps, offset, early: (len(weight), weight.dtype, eps, offset, early))
    return found


@pytest.mark.parametrize("family", TINY)
def test_kernels_that_compute_as_torch_does_are_used_and_their_sizes_are_the_model_s(
    family, tmp_path, interpreted, sizes, monkeypatch
):
    monkeypatch.setattr(kernel_check, "_TOKENS", 4)  # the interpreter takes its time
    write_tiny(tmp_path, family)
    write_tokenizer(tmp_path)
    backend = backends.load("torch", tmp_path, backends.make_recipe(tmp_path, precision="bf16"))
    assert kernel_check._fault(backend.model, DEVICE, torch.bfloat16) == ""
    assert fused._kernels is triton_kernels
    checked = {*sizes}
    backend.logits(np.arange(2))
    # the weight of Gemma 4's values, and of heads in a delta net, is none of the model's
    without = "rms_norm" if family.startswith(("gemma4", "qwen3_5")) else ""
    assert {size for size in sizes - checked if size[0] != without} == set()
    backend.close()


def test_kernels_are_used_in_float32_too(model, interpreted):
    assert kernel_check._fault(model, DEVICE, torch.float32) == ""
    assert fused._kernels is triton_kernels


@pytest.mark.parametrize("name", ["gated", "gated_grads", "rotated", "rms_norm", "rms_norm_grad"])
def test_a_kernel_that_computes_otherwise_is_never_used(model, name, interpreted, monkeypatch):
    own = getattr(triton_kernels, name)

    def wrong(*given):
        found = own(*given)
        changed = found[0] if isinstance(found, tuple) else found
        changed[(0,) * changed.ndim] += 1
        return found

    monkeypatch.setattr(triton_kernels, name, wrong)
    assert "other values" in kernel_check._fault(model, DEVICE, torch.float32)
    assert fused._kernels is None


def test_a_norm_without_its_epsilon_is_never_used(model, interpreted, monkeypatch):
    own = triton_kernels.rms_norm
    monkeypatch.setattr(triton_kernels, "rms_norm", lambda x, weight, eps, *more: own(x, weight, 0.0, *more))
    assert "other values" in kernel_check._fault(model, DEVICE, torch.bfloat16)


@pytest.mark.parametrize("kind", [RuntimeError, ImportError])  # the second of a cache that may not be executed
def test_what_cannot_be_compiled_is_told_once_and_not_used(model, interpreted, monkeypatch, kind):
    def fails(*given):
        raise kind("no C compiler was found\nand more")

    monkeypatch.setattr(triton_kernels, "rotated", fails)
    cases = kernel_check._cases
    monkeypatch.setattr(kernel_check, "_cases", lambda model, _, dtype: cases(model, DEVICE, dtype))
    told = kernel_check.check_kernels(model, torch.device("cuda"), torch.float32)
    assert told == (
        "This GPU computes slower than it could: Triton's kernels are not used, as they cannot be compiled here: "
        "no C compiler was found."
    )
    assert fused._kernels is None
    monkeypatch.setattr(triton_kernels, "rotated", None)
    fused.use(triton_kernels)  # as another GPU may have them
    assert kernel_check.check_kernels(model, torch.device("cuda"), torch.float32) == ""
    assert fused._kernels is None


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_no_memory_is_no_fault_of_the_kernels(model, interpreted, monkeypatch, kind):
    def fails(*given):
        raise kind("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(triton_kernels, "gated", fails)
    with pytest.raises(kind):
        kernel_check._fault(model, DEVICE, torch.float32)
    assert fused._kernels is None


def test_without_triton_the_kernels_of_torch_compute(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_backend.triton_kernels", None)
    monkeypatch.delattr("torch_backend.triton_kernels", raising=False)
    assert kernel_check._fault(model, DEVICE, torch.float32) == "triton is not installed"
    assert fused._kernels is None

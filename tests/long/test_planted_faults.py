"""Faults planted into a copy of the code: the tests that are named beside each must find it, or they hold nothing."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = (
    "cli.py",
    "common",
    "mlx_backend",
    "torch_backend",
    "configs",
    "examples",
    "benchmarks",
    "tests",
    "pyproject.toml",
)


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    right: str
    wrong: str
    tests: str  # below tests/, what must fail


FAULTS = [
    Fault(
        "the label mask is off by one",
        "common/data/batching.py",
        "= row.loss_weights[1:]",
        "= row.loss_weights[:-1]",
        "unit/test_batching.py",
    ),
    Fault(
        "labels are not shifted",
        "common/data/batching.py",
        "= row.ids[:-1], row.ids[1:]",
        "= row.ids[:-1], row.ids[:-1]",
        "unit/test_batching.py",
    ),
    Fault(
        "every epoch has the same row order",
        "common/data/batching.py",
        "[seed, 2, epoch]",
        "[seed, 2, 0]",
        "unit/test_batching.py",
    ),
    Fault(
        "a truncated row is a token too long",
        "common/data/truncation.py",
        "whole.first + max_length)",
        "whole.first + max_length + 1)",
        "unit/test_truncation.py",
    ),
    Fault(
        "a row starts with two BOS tokens",
        "common/data/encode.py",
        "self.bos is not None and ids[0] != bos",
        "self.bos is not None",
        "unit/test_encode.py",
    ),
    Fault(
        "the adapter's factors are crossed in the fusion",
        "common/models/fuse.py",
        "weight.A[k : k + 1]",
        "weight.A[-1 - k][None]",
        "unit/test_fuse.py",
    ),
    Fault(
        "the scale of rsLoRA is lost in the fusion",
        "common/models/fuse.py",
        "np.float32(weight.scale)",
        "np.float32(weight.alpha / weight.rank)",
        "torch/test_torch_backend.py",
    ),
    Fault(
        "DoRA is fused without the lengths of the rows",
        "common/models/fuse.py",
        " / row_lengths(fused))[:, None]",
        ")[:, None]",
        "unit/test_fuse.py",
    ),
    Fault(
        "the end token is lost in generation_config.json",
        "common/export/fused_folder.py",
        "known or []), *served.stops]",
        "known or [])]",
        "unit/test_fused_folder.py",
    ),
    Fault(
        "the end token is lost in the tokenizer",
        "common/export/fused_folder.py",
        'config["eos_token"] = ends[0]',
        "pass",
        "unit/test_fused_folder.py",
    ),
    Fault(
        "a checkpoint is a step late",
        "common/training/loop.py",
        "step % self.plan.save_every == 0",
        "(step - 1) % self.plan.save_every == 0",
        "unit/test_loop.py",
    ),
    Fault(
        "the worst adapter is kept as the best",
        "common/training/validation.py",
        "loss < state.best_valid_loss * (1",
        "loss > state.best_valid_loss * (1",
        "unit/test_loop.py",
    ),
    Fault(
        "the validation loss is a mean of means",
        "common/training/validation.py",
        "sum(float(r.loss_sum) for r in results) / sum(r.weight_sum for r in results)",
        "sum(float(r.loss_sum) / r.weight_sum for r in results) / len(results)",
        "unit/test_loop.py",
    ),
    Fault(
        "the warm-up is a step late",
        "common/training/schedule.py",
        "recipe.learning_rate * step / recipe.warmup_steps",
        "recipe.learning_rate * (step - 1) / recipe.warmup_steps",
        "unit/test_loop.py",
    ),
    Fault(
        "second moments are saved from the first",
        "common/training/checkpoint.py",
        '"exp_avg_sq": optimizer.exp_avg_sq',
        '"exp_avg_sq": optimizer.exp_avg',
        "unit/test_checkpoint.py",
    ),
    Fault(
        "gradients are averaged by micro-batch (MLX)",
        "mlx_backend/backend.py",
        "loss, part = self.gradient(self.tensors, inputs, key)",
        "loss, part = self.gradient(self.tensors, inputs, key); "
        "part = [g * weight / (weight_sum([batch]) * len(micro_batches)) for g in part]",
        "mlx/test_mlx_backend.py",
    ),
    Fault(
        "AdamW corrects no bias (MLX)",
        "mlx_backend/optimizer.py",
        "bias_correction=True",
        "bias_correction=False",
        "parity/test_families.py",
    ),
    Fault(
        "a sliding window is a token too wide (MLX)",
        "mlx_backend/model.py",
        "(distance < window)",
        "(distance <= window)",
        "parity/test_families.py",
    ),
    Fault(
        "gradients are not clipped (PyTorch)",
        "torch_backend/optimizer.py",
        'max_grad_norm or float("inf")',
        'float("inf")',
        "torch/test_torch_backend.py",
    ),
    Fault(
        "a label's weight is lost in its gradient (PyTorch)",
        "torch_backend/loss.py",
        "-= weights[0]",
        "-= 1",
        "torch/test_loss.py",
    ),
    Fault(
        "weight decay falls on norms",
        "common/recipe.py",
        '"norm.weight", ',
        "",
        "mlx/test_mlx_backend.py",
    ),
    Fault(
        "the derivative of the logits' cap is lost (PyTorch)",
        "torch_backend/loss.py",
        "logits *= derivative",
        "pass",
        "torch/test_loss.py",
    ),
    Fault(
        "rows of a LoRA GGUF stay in llama.cpp's order",
        "common/llama_cpp/lora.py",
        "own_A[:, columns], own_B[rows] = A, B",
        "own_A[:, columns], own_B[:] = A, B",
        "gguf/test_gguf_lora.py",
    ),
    Fault(
        "a verdict on NaN is sound",
        "common/verify/judge.py",
        "return all(map(math.isfinite, (link.mean_kl, link.p99_kl, link.perplexity)))",
        "return True",
        "unit/test_divergence.py gguf/test_verify.py",
    ),
    Fault(
        "configs may name code",
        "common/model_files.py",
        "if key not in _CODE}",
        "}",
        "unit/test_model_files.py",
    ),
    Fault(
        "two processes work on one run",
        "common/run_lock.py",
        "lock.acquire(timeout=0)",
        "pass",
        "unit/test_train.py",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources in another folder: what runs there imports them, and not the checkout's."""
    place = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "long")
        (shutil.copytree(path, place / name, ignore=ignored) if path.is_dir() else shutil.copy(path, place / name))
    return place


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_found(fault: Fault, copy: Path) -> None:
    file = copy / fault.file
    text = file.read_text(encoding="utf-8")
    assert text.count(fault.right) == 1, "the code has changed: plant the fault in it again"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in fault.tests.split()]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=900, check=False)
    finally:
        file.write_text(text, encoding="utf-8")
    found = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert (done.returncode, len(found)) == (1, 1), done.stdout[-3000:]
    print(f"{fault.what}: {found[0].split(' - ')[0]}")

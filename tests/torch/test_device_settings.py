"""What torch keeps for the process while a GPU computes: neither is here, so torch's own functions are stood in for."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from common.backend import OutOfMemory
from common.system.cpu_load import OtherPrograms
from tests import ROOT
from torch_backend import device_settings
from torch_backend.device_errors import device_errors
from torch_backend.device_settings import DeviceSettings

pytestmark = pytest.mark.cpu
GB = 10**9


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach torch.cuda and torch.mps, in order."""
    made = []

    def record(module, name, result=None):
        monkeypatch.setattr(module, name, lambda *given: made.append((name, *given)) or result)

    for name in ("set_device", "reset_peak_memory_stats"):
        record(torch.cuda, name)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("set_per_process_memory_fraction", "empty_cache"):
        record(torch.mps, name)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GB)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    return made


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
@pytest.mark.slow
def test_the_gpu_that_computes_is_the_current_one_until_the_end(calls, name, index):
    """`set_device` takes no device without an index, and the other one does."""
    device = torch.device(name)
    settings = DeviceSettings(device, 8 * GB)
    assert calls == [("set_device", index), ("reset_peak_memory_stats", device)]
    settings.restore()
    assert calls[2:] == [("set_device", 0)]


@pytest.mark.slow
def test_the_budget_is_a_real_limit_on_mps_until_the_end(calls):
    settings = DeviceSettings(torch.device("mps"), 4 * GB)
    settings.restore()
    assert calls == [("set_per_process_memory_fraction", 0.4), ("set_per_process_memory_fraction", 1.7)]


@pytest.mark.slow
def test_torchs_own_ceiling_is_not_raised(calls):
    DeviceSettings(torch.device("mps"), 100 * GB)
    assert calls == [("set_per_process_memory_fraction", 1.7)]


@pytest.mark.parametrize(("budget", "variable"), [(0, None), (4 * GB, "0.5")])
@pytest.mark.slow
def test_without_a_budget_or_with_the_users_own_ceiling_nothing_is_set(calls, monkeypatch, budget, variable):
    if variable:
        monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", variable)
    DeviceSettings(torch.device("mps"), budget).restore()
    assert calls == []


@pytest.mark.slow
def test_memory_on_mps_is_what_its_driver_counts(calls, monkeypatch):
    held = iter([3 * GB, 5 * GB, 4 * GB])
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: next(held))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 * GB)
    settings = DeviceSettings(torch.device("mps"), 0)
    found = [settings.memory() for _ in range(3)]
    assert [memory.peak for memory in found] == [3 * GB, 5 * GB, 5 * GB]
    assert {(memory.used, memory.kind) for memory in found} == {(2 * GB, "unified")}


def test_out_of_memory_on_mps_gives_unused_blocks_back(calls, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    text = "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"
    with pytest.raises(OutOfMemory, match="MPS backend out of memory"), device_errors():
        raise RuntimeError(text)
    assert calls == [("empty_cache",)]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_out_of_memory_of_cudas_libraries_is_no_other_error(said):
    with pytest.raises(OutOfMemory), device_errors():
        raise RuntimeError(said)


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("2", 2)])
@pytest.mark.slow
def test_one_thread_a_core_unless_the_user_says_otherwise(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8 if logical else 1)
    torch.set_num_threads(2)
    try:
        settings = DeviceSettings(torch.device("cpu"), 0)
        assert torch.get_num_threads() == threads
        settings.restore()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("3", 3)])
@pytest.mark.slow
def test_a_busy_cpu_gets_fewer_threads_unless_the_user_says_otherwise(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(device_settings, "physical_cores", lambda: 3)
    monkeypatch.setattr(OtherPrograms, "busy_cores", lambda self: self.cores - 1)
    torch.set_num_threads(3)
    try:
        settings = DeviceSettings(torch.device("cpu"), 0)
        settings.adapt_threads()
        assert torch.get_num_threads() == threads
        assert settings.threads() == (None if variable else (1, 3))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_no_compiled_code_is_fetched_from_the_hub(tmp_path):
    """bitsandbytes does so at its import, on processors with bf16, and says where it cannot; so does transformers."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')\n")
    code = (
        "import torch_backend.backend, bitsandbytes\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "try: import kernels\n"
        "except ImportError: print('blocked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("blocked\n", "")

"""What the machine has, and which backend to use on it. No framework is loaded here: backends answer for theirs."""

import importlib.util
import math
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.backend_package import Backends, Choice
from common.errors import UserError, install_extra
from common.system.cgroup import core_limit


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int | None  # bytes; None where NVML tells none, as where it is the CPU's (DGX Spark, Jetson)


def apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def cores() -> int:
    """How many logical cores this process may use: those of its affinity, or less by its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = core_limit()
    return max(1, min(allowed, math.ceil(limit.amount))) if limit else allowed


def physical_cores() -> int:
    """As many threads as compute best: two threads of one core wait for each other."""
    import psutil

    return min(cores(), psutil.cpu_count(logical=False) or cores())


def thread_limit() -> int | None:
    """Threads for a program that counts the machine's cores by itself; None where nothing holds this process to fewer.

    OMP_NUM_THREADS does, a container's quota, and an affinity (`taskset`).
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return physical_cores() if core_limit() or cores() < (os.cpu_count() or 1) else None


def nvidia_gpus() -> list[Gpu]:
    """All NVIDIA GPUs in their driver's order, which need not be CUDA's; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return [Gpu(pynvml.nvmlDeviceGetName(handle), _memory(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []


def _memory(handle: Any) -> int | None:
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return None


def nvidia_free(uuid: str) -> int | None:
    """Free bytes of the GPU with this identifier, without a context on it; None where the driver cannot tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")).free)
    except pynvml.NVMLError:
        return None


def apple_precision() -> Choice:
    return Choice("bf16", "an Apple GPU takes it (M1 and M2 emulate it: slower but right)")


def nvidia_precision(name: str, capability: tuple[int, int]) -> Choice:
    """bf16 where the GPU that will compute has it, else float32."""
    if capability >= (8, 0):
        return Choice("bf16", f"{name} is Ampere or later")
    return Choice("fp32", f"{name} is older than Ampere and has no bf16")


@cache
def cpu_bf16() -> str:
    """The CPU's bf16 instructions, or nothing. Linux only: elsewhere nobody trains on the CPU in bf16."""
    flags = cpu_flags()
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), "")


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do, as `avx2`, among other words of its description; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(file.read().split())
    except OSError:
        return set()


def choose_backend(wanted: str, backends: Backends) -> Choice:
    """Under auto MLX on Apple silicon, else torch. Raises UserError where `wanted` is not here."""
    if wanted == "auto":
        return _auto(backends)
    if fault := backends(wanted).fault():
        raise UserError(f"--backend {wanted}: {fault.what}", fault.fix)
    return Choice(wanted, "asked for")


def _auto(backends: Backends) -> Choice:
    apple, mlx = apple_silicon(), backends("mlx").fault()
    if apple and mlx is None:
        try:
            backends("mlx").choose_device("auto")
        except UserError as error:  # installed, but it cannot be loaded
            mlx = error
        else:
            return Choice("mlx", "this is Apple silicon")
    if fault := backends("torch").fault():
        raise UserError(f"--backend torch: {fault.what}", fault.fix)
    unusable = mlx is not None and installed("mlx") and installed("mlx_lm")
    warning = f"{mlx.what} {mlx.fix}" if mlx and unusable else ""
    if apple and mlx:
        return Choice("torch", f"this is Apple silicon, but {mlx.what.rstrip('.')}", warning)
    device = backends("torch").choose_device("auto")
    why = device.why if device.value.startswith("cuda") else f"no Apple silicon and {device.why}: the CPU"
    return Choice("torch", why, warning)


def mlx_install() -> str:
    """The command that installs MLX and mlx-lm on this system."""
    if sys.platform == "darwin":
        return "pip install mlx mlx-lm"
    if sys.platform.startswith("linux"):
        return f"{install_extra('mlx-cpu')} (with an NVIDIA GPU mlx-cuda12 or mlx-cuda13)"
    return "use --backend torch: MLX has no build for this system"


def mlx_fault() -> UserError | None:
    """What is missing of MLX and mlx-lm, and the command that installs it. The MLX export needs them on any backend."""
    for module in ("mlx", "mlx_lm"):
        if not installed(module):
            return UserError(f"{module.replace('_', '-')} is not installed.", mlx_install())
    if sys.platform.startswith("linux") and not _has_mlx_library():
        return UserError("mlx is installed without its CPU or CUDA part (libmlx.so).", mlx_install())
    return None


def _has_mlx_library() -> bool:
    """On Linux the package mlx holds the Python part alone; mlx-cpu or mlx-cuda brings the library."""
    spec = importlib.util.find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "lib" / "libmlx.so").exists() for folder in folders or ())

"""What the machine has, and which backend to use on it. No framework is loaded here: backends answer for theirs."""

import importlib.util
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.backend import Backends, Choice
from common.errors import UserError


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes


def apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def nvidia_gpu() -> Gpu | None:
    """The first NVIDIA GPU as its driver reports it; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
    except pynvml.NVMLError:
        return None
    return Gpu(name if isinstance(name, str) else name.decode(), tuple(capability), int(memory))


def gpu_precision() -> Choice:
    """bf16 where the GPU computes it (M1 and M2 emulate it), else float32."""
    if apple_silicon():
        return Choice("bf16", "an Apple GPU takes it (M1 and M2 emulate it: slower but right)")
    gpu = nvidia_gpu()
    if gpu is not None and gpu.capability >= (8, 0):
        return Choice("bf16", f"{gpu.name} is Ampere or later")
    return Choice("fp32", "the GPU is older than Ampere and has no bf16")


def cpu_bf16() -> str:
    """The CPU's bf16 instructions, or nothing. Linux only: elsewhere nobody trains on the CPU in bf16."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return ""
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in words), "")


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
    why = device.why if device.value == "cuda" else f"no Apple silicon and {device.why}: the CPU"
    return Choice("torch", why, warning)


def mlx_install() -> str:
    """The command that installs MLX and mlx-lm on this system."""
    if sys.platform == "darwin":
        return "pip install mlx mlx-lm"
    if sys.platform.startswith("linux"):
        return 'pip install -e ".[mlx-cpu]" (or mlx-cuda12, mlx-cuda13 with an NVIDIA GPU)'
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

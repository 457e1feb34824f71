"""Which backend, device and precision, and why: looked at without loading a framework where that is possible."""

import ctypes
import ctypes.util
import importlib.util
import platform
import sys
from dataclasses import dataclass
from functools import cache

from common.errors import UserError

MLX_GROUP_SIZE = 64  # weights that share a scale, mlx-lm's default
MLX_INSTALL = {
    "darwin": "pip install mlx mlx-lm",
    "linux": 'pip install -e ".[mlx-cpu]" (or mlx-cuda12, mlx-cuda13 with an NVIDIA GPU)',
}


@dataclass(frozen=True)
class Choice:
    value: str
    why: str


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


def torch_sees_cuda() -> bool:
    """Whether the installed torch can use the NVIDIA GPU (a CPU build cannot)."""
    if nvidia_gpu() is None:
        return False
    import torch

    return torch.cuda.is_available()


def choose_backend(wanted: str) -> Choice:
    """Raises UserError saying what to install where the wanted backend is not there."""
    if wanted == "auto":
        absent = [module.replace("_", "-") for module in ("mlx", "mlx_lm") if not installed(module)]
        if apple_silicon() and not absent:
            return Choice("mlx", "this is Apple silicon")
        if apple_silicon():
            return Choice("torch", f"{' and '.join(absent)} not installed, though this is Apple silicon")
        if torch_sees_cuda():
            return Choice("torch", "an NVIDIA GPU is here")
        return Choice("torch", "no Apple silicon and no NVIDIA GPU that torch can use: the CPU")
    if wanted == "mlx":
        for module in ("mlx", "mlx_lm"):
            if not installed(module):
                how = MLX_INSTALL.get(sys.platform, "use --backend torch: MLX has no build for this system")
                raise UserError(f"--backend mlx: {module.replace('_', '-')} is not installed.", how)
    elif not installed("torch"):
        raise UserError("--backend torch: torch is not installed.", "pip install torch")
    return Choice(wanted, "asked for")


def choose_device(wanted: str, backend: str) -> Choice:
    """Raises UserError where the wanted device is not there, or is not the backend's."""
    if backend == "mlx":
        preload()
        import mlx.core as mx

        gpu = mx.is_available(mx.gpu)
        if wanted in ("cuda", "mps"):
            raise UserError(f"--device {wanted} is torch's; MLX has cpu and gpu.", "Use --device gpu, or auto.")
        if wanted == "gpu" and not gpu:
            raise UserError("--device gpu: this MLX sees no GPU.", "Use --device cpu, or install mlx-cuda12 or -13.")
        if wanted == "auto":
            return Choice("gpu", "MLX has a GPU here") if gpu else Choice("cpu", "MLX has no GPU here")
        return Choice(wanted, "asked for")
    if wanted == "mps":
        import torch

        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch sees no Metal GPU here.", "Use --device cpu, or auto.")
        return Choice("mps", "asked for")
    if wanted in ("gpu", "cuda") and not torch_sees_cuda():
        raise UserError(
            f"--device {wanted}: torch sees no NVIDIA GPU here.",
            "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu.",
        )
    if wanted == "auto":
        if torch_sees_cuda():
            return Choice("cuda", "an NVIDIA GPU is here")
        return Choice("cpu", "no NVIDIA GPU that torch can use")
    return Choice("cuda" if wanted == "gpu" else wanted, "asked for")


def free_memory(backend: str, device: str) -> tuple[int, str]:
    """Bytes that training could take on the device, and what they are: a GPU's, or the machine's."""
    import psutil

    free = int(psutil.virtual_memory().available)
    if backend == "mlx" and device == "gpu":
        preload()
        import mlx.core as mx

        recommended = int(mx.device_info().get("max_recommended_working_set_size", free))
        return min(recommended, free), "the GPU's recommended working set"
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]), "the GPU's free memory"
    return free, "the free memory"


def quantization_scheme(wanted: str, backend: str) -> str:
    """The recipe's name of how the frozen base is quantized. Raises UserError where that cannot be computed here."""
    if wanted == "none":
        return "none"
    if backend == "mlx":
        return f"mlx-{wanted}-{MLX_GROUP_SIZE}"
    if not installed("bitsandbytes"):
        raise UserError(f"--quantization {wanted}: bitsandbytes is not installed.", 'pip install -e ".[bitsandbytes]"')
    return {"4bit": "nf4", "8bit": "int8"}[wanted]


def choose_precision(wanted: str, backend: str, device: str) -> Choice:
    """bf16 where the hardware computes it (emulated, slower but right, on M1 and M2), else float32."""
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if backend == "mlx" and device == "cpu":
        return Choice("fp32", "MLX's bf16 products crawl on a CPU")
    if apple_silicon() and device in ("gpu", "mps"):
        return Choice("bf16", "an Apple GPU takes it (M1 and M2 emulate it: slower but right)")
    if device in ("cuda", "gpu"):
        gpu = nvidia_gpu()
        if gpu is not None and gpu.capability >= (8, 0):
            return Choice("bf16", f"{gpu.name} is Ampere or later")
        return Choice("fp32", "the GPU is older than Ampere and has no bf16")
    if flags := cpu_bf16():
        return Choice("bf16", f"this CPU has {flags}")
    return Choice("fp32", "this CPU has no bf16 instructions")


def cpu_bf16() -> str:
    """The CPU's bf16 instructions, or nothing. Linux only: elsewhere nobody trains on the CPU in bf16."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(file.read().split())
    except OSError:
        return ""
    return next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in words), "")


INSTALL = "apt install libopenblas0-pthread (Debian, Ubuntu) or dnf install openblas (Fedora)"


def preload() -> str | None:
    """Load OpenBLAS so that MLX's products use it; must run before mlx is imported. Its name, or None if not found.

    A library loaded globally comes before those that mlx brings along, so its `cblas_sgemm` is the one called: about
    15 times faster than the reference BLAS on two cores. Elsewhere than on Linux there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    if loaded := _already_loaded():
        return loaded
    name = ctypes.util.find_library("openblas")
    if name is None or "mlx.core" in sys.modules:
        return None
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return name


def _already_loaded() -> str | None:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            name = line.rsplit("/", 1)[-1].strip()
            # numpy's and scipy's own copies carry prefixed names that nobody else can call
            if name.startswith(("libopenblas", "libmkl_rt", "libblis")):
                return name
    return None

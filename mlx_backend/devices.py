"""MLX's devices: which there are, what they compute in, and their free memory. Imports MLX only when asked."""

from typing import Any

from common.backend_package import Choice
from common.errors import UserError
from common.memory_terms import ModelDims
from common.system.hardware import apple_precision, apple_silicon, mlx_fault, mlx_install, nvidia_precision
from common.system.memory import available, available_to_gpu
from mlx_backend.blas import preload, slow_core

_GROUP_SIZE = 64  # weights that share a scale, mlx-lm's default
_INSTALL_BLAS = "apt install libopenblas0-pthread (Debian, Ubuntu) or dnf install openblas (Fedora)"


def fault() -> UserError | None:
    return mlx_fault()


def choose_device(wanted: str) -> Choice:
    if wanted.startswith(("cuda", "mps")):
        other = f" with CUDA_VISIBLE_DEVICES={wanted[5:]} in the environment" if ":" in wanted else ", or auto"
        raise UserError(f"--device {wanted} is torch's; MLX has cpu and gpu.", f"Use --device gpu{other}.")
    blas, mx = preload(), import_mlx()
    gpu = mx.is_available(mx.gpu)
    if wanted == "gpu" and not gpu:
        raise UserError("--device gpu: this MLX sees no GPU.", "Use --device cpu, or install mlx-cuda12 or -13.")
    if wanted == "gpu" or (wanted == "auto" and gpu):
        return Choice("gpu", ("asked for" if wanted == "gpu" else "MLX has a GPU here") + _first_of(mx))
    why = "asked for" if wanted == "cpu" else "MLX has no GPU here"
    if blas is None:
        slow = f"MLX will be about 15 times slower than it could be: no OpenBLAS was found. {_INSTALL_BLAS}"
        return Choice("cpu", why, slow)
    core = slow_core()
    slow = f"{blas} does not know this CPU, and was loaded with its slowest kernels: set OPENBLAS_CORETYPE={core}"
    return Choice("cpu", f"{why}; {blas} computes its products", slow if core else "")


def rank_device(wanted: str, local_rank: int) -> str:
    """MLX has one GPU a process, which CUDA_VISIBLE_DEVICES chooses."""
    return wanted


def device_count(device: str) -> int:
    return 1


def _first_of(mx: Any) -> str:
    """Which GPU MLX computes on, where it has several."""
    count = mx.device_count(mx.gpu)
    if count < 2:
        return ""
    name = mx.device_info(mx.gpu)["device_name"]
    return f"; the first of {count}, {name}: CUDA_VISIBLE_DEVICES chooses another"


def import_mlx() -> Any:
    """`mlx.core`. Raises UserError where it is installed but cannot be loaded."""
    try:
        import mlx.core as mx
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"MLX is installed but cannot be loaded: {reason}", mlx_install()) from None
    return mx


def choose_precision(wanted: str, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cpu":
        return Choice("fp32", "MLX's bf16 products are very slow on a CPU")
    if apple_silicon():
        return apple_precision()
    card = import_mlx().device_info(import_mlx().gpu)
    return nvidia_precision(card["device_name"], (card["compute_capability_major"], card["compute_capability_minor"]))


def free_memory(device: str) -> tuple[int, str]:
    if device == "cpu":
        return available(), "the free memory"
    preload()
    mx = import_mlx()
    card = mx.device_info(mx.gpu)
    if "free_memory" in card:  # CUDA's; it names no recommended size
        return min(int(card["free_memory"]), mx.get_memory_limit()), "the GPU's free memory"
    return min(int(card["max_recommended_working_set_size"]), available_to_gpu()), "what a GPU may take of the memory"


def card_memory(device: str) -> int | None:
    """Bytes of the NVIDIA GPU that computes; None on another device, which shares the computer's memory."""
    if device == "cpu":
        return None
    mx = import_mlx()
    card = mx.device_info(mx.gpu)
    return int(card["total_memory"]) if {"free_memory", "total_memory"} <= card.keys() else None  # CUDA's keys


def quantization_scheme(wanted: str) -> str:
    """MLX's own affine quantization: `mlx-4bit-64`."""
    return "none" if wanted == "none" else f"mlx-{wanted}-{_GROUP_SIZE}"


def is_deterministic(dims: ModelDims, device: str, precision: str) -> bool:
    return device == "cpu"

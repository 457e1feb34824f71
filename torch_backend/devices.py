"""torch's devices: which there are, what they compute in, and their free memory. Imports torch only when asked."""

from common.backend import Choice
from common.errors import UserError
from common.memory_terms import ModelDims
from common.system.hardware import apple_silicon, cpu_bf16, gpu_precision, installed, nvidia_gpu
from common.system.memory import available
from torch_backend.memory_terms import packs_attention


def fault() -> UserError | None:
    return None if installed("torch") else UserError("torch is not installed.", "pip install torch")


def choose_device(wanted: str) -> Choice:
    if wanted == "mps":
        import torch

        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch sees no Metal GPU here.", "Use --device cpu, or auto.")
        return Choice("mps", "asked for")
    if wanted == "cpu":
        return Choice("cpu", "asked for")
    if wanted == "auto":
        if sees_cuda():
            return Choice("cuda", "an NVIDIA GPU is here")
        return Choice("cpu", "no NVIDIA GPU that torch can use")
    if not sees_cuda():
        raise UserError(
            f"--device {wanted}: torch sees no NVIDIA GPU here.",
            "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu.",
        )
    return Choice("cuda", "asked for")


def sees_cuda() -> bool:
    """Whether the installed torch can use the NVIDIA GPU (a CPU build cannot)."""
    if nvidia_gpu() is None:
        return False
    import torch

    return torch.cuda.is_available()


def choose_precision(wanted: str, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device == "cuda" or (device == "mps" and apple_silicon()):
        return gpu_precision()
    if flags := cpu_bf16():
        return Choice("bf16", f"this CPU has {flags}")
    return Choice("fp32", "this CPU has no bf16 instructions")


def free_memory(device: str) -> tuple[int, str]:
    if device != "cuda":
        return available(), "the free memory"
    import torch

    return int(torch.cuda.mem_get_info()[0]), "the GPU's free memory"


def quantization_scheme(wanted: str) -> str:
    """bitsandbytes' schemes: nf4, int8."""
    if wanted == "none":
        return "none"
    if not installed("bitsandbytes"):
        raise UserError(f"--quantization {wanted}: bitsandbytes is not installed.", 'pip install -e ".[bitsandbytes]"')
    return {"4bit": "nf4", "8bit": "int8"}[wanted]


def is_deterministic(dims: ModelDims, device: str, precision: str) -> bool:
    """On a GPU only FlashAttention has a deterministic backward pass."""
    return device == "cpu" or packs_attention(dims.head_dim, dims.capped, device, precision)

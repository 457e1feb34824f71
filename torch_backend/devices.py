"""torch's devices: which there are, what they compute in, and their free memory. Imports torch only when asked."""

from dataclasses import dataclass
from pathlib import Path

from common.backend_package import Choice
from common.errors import UserError, install_extra
from common.memory_terms import ModelDims
from common.system.hardware import (
    apple_precision,
    apple_silicon,
    cpu_bf16,
    installed,
    nvidia_free,
    nvidia_gpus,
    nvidia_precision,
)
from common.system.memory import available, available_to_gpu
from torch_backend.memory_terms import packs_attention

AMD_DRIVER = Path("/dev/kfd")  # of ROCm's driver, on Linux


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU as torch sees it: of those that CUDA_VISIBLE_DEVICES leaves, in CUDA's order."""

    name: str
    capability: tuple[int, int]
    uuid: str


def fault() -> UserError | None:
    return None if installed("torch") else UserError("torch is not installed.", "pip install torch")


def choose_device(wanted: str) -> Choice:
    """cpu, mps, cuda, or cuda:1 where torch sees several NVIDIA GPUs."""
    if wanted == "mps":
        import torch

        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch sees no Metal GPU here.", "Use --device cpu, or auto.")
        return Choice("mps", "asked for")
    if wanted == "cpu":
        return Choice("cpu", "asked for")
    seen = cards()
    if not seen and wanted == "auto":
        return Choice("cpu", "no NVIDIA GPU that torch can use", _rocm_warning())
    if not seen:
        raise UserError(
            f"--device {wanted}: torch sees no NVIDIA GPU here.",
            "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu.",
        )
    if ":" in wanted:
        return _named(wanted, seen)
    if len(seen) == 1:
        return Choice("cuda", "an NVIDIA GPU is here" if wanted == "auto" else "asked for")
    return _freest(seen)


def rank_device(wanted: str, local_rank: int) -> str:
    """Under auto and cuda each rank has the next GPU, round and round where there are more ranks than GPUs."""
    if wanted not in ("auto", "cuda"):
        return wanted
    count = len(cards())
    return f"cuda:{local_rank % count}" if count else wanted


def device_count(device: str) -> int:
    return len(cards()) if device.startswith("cuda") else 1


def cards() -> list[Card]:
    """The NVIDIA GPUs that the installed torch can use; a CPU build can use none."""
    if not nvidia_gpus():  # torch need not be imported to know
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Card(card.name, (card.major, card.minor), str(card.uuid)) for card in found]


def _rocm_warning() -> str:
    """Says that the GPU is left alone where torch is built for ROCm and sees one; else nothing."""
    if not AMD_DRIVER.exists():  # torch need not be imported to know
        return ""
    import torch

    if torch.version.hip is None or not torch.cuda.is_available():
        return ""
    return "torch sees an AMD GPU, but Twintune was never run on ROCm: the CPU computes"


def _named(wanted: str, seen: list[Card]) -> Choice:
    index = _index(wanted)
    if index >= len(seen):
        known = ", ".join(f"cuda:{number} ({card.name})" for number, card in enumerate(seen))
        raise UserError(f"--device {wanted}: there is no such GPU.", f"torch sees {known}.")
    return Choice(wanted, f"asked for: {seen[index].name}")


def _freest(seen: list[Card]) -> Choice:
    free = [_free(index, card) for index, card in enumerate(seen)]
    index = free.index(max(free))
    why = f"the freest of {len(seen)} NVIDIA GPUs: {seen[index].name}, {free[index] / 1e9:.1f} GB free"
    return Choice(f"cuda:{index}", why)


def _free(index: int, card: Card) -> int:
    free = nvidia_free(card.uuid)
    if free is not None:
        return free
    import torch

    return int(torch.cuda.mem_get_info(index)[0])  # takes some memory of the GPU by itself


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def choose_precision(wanted: str, device: str) -> Choice:
    if wanted != "auto":
        return Choice(wanted, "asked for")
    if device.startswith("cuda"):
        card = cards()[_index(device)]
        return nvidia_precision(card.name, card.capability)
    if device == "mps" and apple_silicon():
        return apple_precision()
    if flags := cpu_bf16():
        return Choice("bf16", f"this CPU has {flags}")
    return Choice("fp32", "this CPU has no bf16 instructions")


def free_memory(device: str) -> tuple[int, str]:
    if device == "cpu":
        return available(), "the free memory"
    import torch

    if device == "mps":
        return min(int(torch.mps.recommended_max_memory()), available_to_gpu()), "what a GPU may take of the memory"
    return int(torch.cuda.mem_get_info(_index(device))[0]), "the GPU's free memory"


def quantization_scheme(wanted: str) -> str:
    """bitsandbytes' schemes: nf4, int8."""
    if wanted == "none":
        return "none"
    if not installed("bitsandbytes"):
        raise UserError(f"--quantization {wanted}: bitsandbytes is not installed.", install_extra("bitsandbytes"))
    return {"4bit": "nf4", "8bit": "int8"}[wanted]


def is_deterministic(dims: ModelDims, device: str, precision: str) -> bool:
    """On a GPU only FlashAttention has a deterministic backward pass."""
    return device == "cpu" or packs_attention(dims.head_dim, dims.padded, device, precision)

"""The contract of `common/backend.py` in PyTorch and PEFT's conventions.

`BackendPackage` says what each name here answers. torch is imported by `create`, or by what must look at a device.
"""

import os
import sys
from pathlib import Path

from common.backend_package import Group
from common.models.model_folder import ModelFolder
from common.rank_backend import RankBackend
from torch_backend import memory_terms
from torch_backend.devices import (
    choose_device,
    choose_precision,
    device_count,
    fault,
    free_memory,
    is_deterministic,
    quantization_scheme,
    rank_device,
)

# By this package transformers and bitsandbytes fetch compiled code from the hub, without a hash, and run it.
sys.modules["kernels"] = None  # type: ignore[assignment]

# oneDNN keeps 1,024 compiled products, of each length of a micro-batch others, and 64 are as fast: a run of 63 steps of
# varied lengths took 1.15 GB with these and 1.37 GB with all, at 275 and 271 tokens/s (SmolLM2-135M in bf16, an Intel
# Xeon with amx_bf16, 30 November 2026, commit 28edcb9). oneDNN reads it when the first one is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

__all__ = [
    "choose_device",
    "choose_precision",
    "create",
    "device_count",
    "fault",
    "free_memory",
    "is_deterministic",
    "join",
    "launch",
    "memory_terms",
    "plain_layers",
    "quantization_scheme",
    "rank_device",
]


def create() -> RankBackend:
    from torch_backend.backend import TorchBackend

    return TorchBackend()


def plain_layers(folder: Path) -> dict[str, tuple[int, int]]:
    from torch_backend.model import plain_layers

    return plain_layers(ModelFolder(folder))


def join(device: str) -> Group:
    from torch_backend.group import TorchGroup

    return TorchGroup(device)


def launch(count: int, command: list[str]) -> int:
    from torch_backend.launch import launch

    return launch(count, command)

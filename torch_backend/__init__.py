"""The contract of `common/backend.py` in PyTorch and PEFT's conventions.

`BackendPackage` says what each name here answers. torch is imported by `create`, or by what must look at a device.
"""

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

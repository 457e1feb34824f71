"""The contract of `common/backend.py` in PyTorch and PEFT's conventions.

`BackendPackage` says what each name here answers. torch is imported by `create`, or by what must look at a device.
"""

import logging
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
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for that package when PEFT imports it

# oneDNN keeps 1,024 compiled products, of each length of a micro-batch others. 256 were as fast (290 to 301 tokens/s on
# the example, 298 to 300 with all; 64 were a tenth slower), and took 1.29 GB in 63 steps of varied lengths in place of
# 1.35 (SmolLM2-135M in bf16, an Intel Xeon with amx_bf16, 30 November 2026, commit 5107211). It is read when the first
# one is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

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

"""The contract of `common/backend.py` in MLX, over mlx-lm's layers.

`BackendPackage` says what each name here answers. MLX is imported by `create`, or by what must look at a device.
"""

import os
from pathlib import Path

from common.backend_package import Group
from common.models.model_folder import ModelFolder
from common.rank_backend import RankBackend
from mlx_backend import memory_terms
from mlx_backend.devices import (
    choose_device,
    choose_precision,
    device_count,
    fault,
    free_memory,
    is_deterministic,
    quantization_scheme,
    rank_device,
)

# On NVIDIA MLX else rounds the inputs of float32 products to TF32's ten bits, where torch's are exact. It is read when
# the first one is computed.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

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
    from mlx_backend.backend import MlxBackend

    return MlxBackend()


def plain_layers(folder: Path) -> dict[str, tuple[int, int]]:
    from mlx_backend.model import plain_layers

    return plain_layers(ModelFolder(folder))


def join(device: str) -> Group:
    from mlx_backend.group import MlxGroup

    return MlxGroup()


def launch(count: int, command: list[str]) -> int:
    from mlx_backend.launch import launch

    return launch(count, command)

"""The contract of `common/backend.py` in MLX, over mlx-lm's layers.

`BackendPackage` says what each name here answers. MLX is imported by `create`, or by what must look at a device.
"""

from common.backend import Backend
from mlx_backend import memory_terms
from mlx_backend.devices import (
    choose_device,
    choose_precision,
    fault,
    free_memory,
    is_deterministic,
    quantization_scheme,
)

__all__ = [
    "choose_device",
    "choose_precision",
    "create",
    "fault",
    "free_memory",
    "is_deterministic",
    "memory_terms",
    "quantization_scheme",
]


def create() -> Backend:
    from mlx_backend.backend import MlxBackend

    return MlxBackend()

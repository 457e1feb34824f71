"""The contract of `common/backend.py` in PyTorch and PEFT's conventions.

`BackendPackage` says what each name here answers. torch is imported by `create`, or by what must look at a device.
"""

from common.backend import Backend
from torch_backend import memory_terms
from torch_backend.devices import (
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
    from torch_backend.backend import TorchBackend

    return TorchBackend()

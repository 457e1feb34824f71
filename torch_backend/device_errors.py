"""The framework's own errors of a device, as the contract knows them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.backend import OutOfMemory
from common.errors import device_fault, first_line
from torch_backend.device_settings import empty_cache

# torch on a CPU; a driver, by way of torch or Triton; CUDA's libraries, of which cuBLAS says NOT_INITIALIZED.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "cublasCreate(handle)")


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def device_errors() -> Iterator[None]:
    """OutOfMemory for what torch raises on a GPU (OutOfMemoryError, or CUDA's libraries) and on a CPU (RuntimeError).

    UserError for another fault of a GPU, which CUDA reports at whatever is asked next.
    """
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            empty_cache()
            raise OutOfMemory(first_line(error)) from None
        if isinstance(error, torch.AcceleratorError):
            raise device_fault(error) from None
        raise

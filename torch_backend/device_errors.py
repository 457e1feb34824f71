"""The framework's own errors of a device, as the contract knows them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.backend import OutOfMemory
from common.errors import device_fault
from torch_backend.device_settings import empty_cache


@contextmanager
def device_errors() -> Iterator[None]:
    """OutOfMemory for what torch raises on a GPU (OutOfMemoryError) and on a CPU (a plain RuntimeError).

    UserError for another fault of a GPU, which CUDA reports at whatever is asked next.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text:
            empty_cache()
            raise OutOfMemory(text.split("\n")[0]) from None
        if isinstance(error, torch.AcceleratorError):
            raise device_fault(error) from None
        raise

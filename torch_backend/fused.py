"""Whether Triton's kernels compute on a GPU; they do where they were seen to compute what torch's own kernels do."""

from typing import Any

import torch

_kernels: Any = None  # the module `triton_kernels`


def kernels(x: torch.Tensor) -> Any:
    """The module whose kernels compute with `x`, or None."""
    return _kernels if x.is_cuda else None


def use(module: Any) -> None:
    """Of all models of the process. module: `triton_kernels`, or None."""
    global _kernels
    _kernels = module

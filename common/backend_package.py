"""What a backend's package says of itself and of the machine before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.backend import Backend
from common.errors import UserError
from common.memory_terms import MemoryTerms, ModelDims


@dataclass(frozen=True)
class Choice:
    """A backend, device or precision, and the reason for it. `warning`: what the user should know, or nothing."""

    value: str
    why: str
    warning: str = ""


class BackendPackage(Protocol):
    """What `torch_backend` and `mlx_backend` answer; importing them imports no framework."""

    memory_terms: MemoryTerms

    def create(self) -> Backend:
        """A backend with nothing loaded yet; its framework is imported only now."""

    def fault(self) -> UserError | None:
        """What its installation lacks, and the command that installs it; None where nothing is missing."""

    def choose_device(self, wanted: str) -> Choice:
        """The device for `--device wanted`. Raises UserError where it is not here or cannot be loaded."""

    def choose_precision(self, wanted: str, device: str) -> Choice:
        """bf16 or fp32 for `--precision wanted`: under auto bf16 where the device computes it."""

    def free_memory(self, device: str) -> tuple[int, str]:
        """Bytes that training could take on the device, and what they are: a GPU's, or the machine's."""

    def quantization_scheme(self, wanted: str) -> str:
        """The recipe's name for `--quantization wanted`. Raises UserError where it cannot be computed here."""

    def is_deterministic(self, dims: ModelDims, device: str, precision: str) -> bool:
        """Whether the same training gives the same bits again."""


Backends = Callable[[str], BackendPackage]  # by name: torch, mlx

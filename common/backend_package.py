"""What a backend's package says of itself and of the machine before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.backend import Backend
from common.errors import UserError
from common.memory_terms import MemoryTerms, ModelDims
from common.rank_backend import RankBackend

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


@dataclass(frozen=True)
class Choice:
    """A backend, device or precision, and the reason for it. `warning`: what the user should know, or nothing."""

    value: str
    why: str
    warning: str = ""


class Group(Protocol):
    """The processes that a launcher has started to train together, each a rank. All call the same, in the same order.

    Each method raises RankLost where one of them has ended.
    """

    rank: int
    size: int

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's data, on every rank; the others give None."""

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """Every rank's array, by rank, on every rank; all are of one shape and type."""

    def close(self) -> None:
        """Leave; nobody calls anything after that."""


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

    def plain_layers(self, folder: Path) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers that its library's model of `folder` has, by name from the layer's number on.

        Nothing is loaded. Raises UserError where the library does not know the architecture.
        """

    def is_deterministic(self, dims: ModelDims, device: str, precision: str) -> bool:
        """Whether the same training gives the same bits again."""


class RankPackage(BackendPackage, Protocol):
    """What else they answer of a training on several devices."""

    def create(self) -> RankBackend: ...

    def rank_device(self, wanted: str, local_rank: int) -> str:
        """The device for `--device wanted` of one of several ranks on this machine."""

    def device_count(self, device: str) -> int:
        """How many devices of this kind there are, for `--devices all`."""

    def launch(self, count: int, command: list[str]) -> int:
        """Run the Python program `command` in so many processes, by the framework's own launcher; the exit status."""

    def join(self, device: str) -> Group:
        """The group that the launcher's environment describes, for a rank that computes on the device."""


Backends = Callable[[str], BackendPackage]  # by name: torch, mlx

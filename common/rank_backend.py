"""What a backend answers besides, where several compute a step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, SupportsFloat

from common.backend import Backend, Batch

if TYPE_CHECKING:
    import numpy as np


class RankBackend(Backend, Protocol):
    """A backend that can be one of several ranks, which compute a step together."""

    def accumulate(self, micro_batches: Sequence[Batch], weight: float, step: int) -> int:
        """Begin a step of which others compute a part: the gradients of these of its micro-batches, if any.

        weight: the sum of weights of the complete step, by which each part is divided. Returns the positions that
        attention computes. Raises OutOfMemory with weights and optimizer state as they were.
        """
        ...

    def sum_gradients(self) -> None:
        """Add to the loss and the gradients what the other ranks have accumulated: all get the same bits.

        Raises RankLost.
        """
        ...

    def accumulated_loss(self) -> float:
        """The sum over label tokens of what was accumulated; waits for the device."""
        ...

    def gradients(self) -> dict[str, np.ndarray]:
        """What was accumulated, by the names of optimizer state: of the weighted mean over the complete step."""
        ...

    def add_gradients(self, loss: float, gradients: dict[str, np.ndarray]) -> None:
        """Add what another backend has accumulated of the same step."""
        ...

    def apply_gradients(self, learning_rate: float) -> tuple[SupportsFloat, SupportsFloat]:
        """End the step: clip, and update the weights. `(the loss's sum over label tokens, the gradient norm)`."""
        ...

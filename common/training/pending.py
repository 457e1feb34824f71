"""A step that was started."""

from dataclasses import dataclass

from common.backend import Batch, StepResult
from common.data.encode import Encoded
from common.errors import UserError


@dataclass(frozen=True)
class Pending:
    """A step that the device may still be computing: its figures are read a step later, so the device never idles."""

    number: int
    rate: float
    rows: list[Encoded]
    batches: list[Batch]
    result: StepResult
    started: float
    threads: tuple[int, int] | None = None  # as cpu_threads gives them

    def read(self) -> tuple[float, float]:
        """`(mean loss, gradient norm)`, after waiting for them. Raises UserError for a fault the device reports."""
        try:
            return float(self.result.loss_sum) / self.result.weight_sum, float(self.result.grad_norm)
        except RuntimeError as error:
            raise UserError(
                f"Step {self.number} failed on the device: {str(error).splitlines()[0]}",
                "Continue with --resume RUN and a lower --memory-limit.",
            ) from None

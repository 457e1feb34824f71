"""Errors that a GPU reports late, and how a step can be undone until the GPU is known to have written it.

A command buffer of Metal that fails leaves its arrays unwritten. Its error is raised by a later call that uses the
stream, whatever that one computes; waiting for an array may end without it, and `mx.synchronize` does not (ml-explore/
mlx, pull requests 3523, 4134, 4174). So the weights and moments before a step are kept until the next step has waited
for it and was accepted by the stream. Where running out of memory is likely, and where a step's results are read, the
device is synchronized instead.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat

import mlx.core as mx

from common.backend import OutOfMemory
from common.errors import UserError, device_fault
from common.memory_terms import MicroBatchShape

_SHORT = 0.9  # of the memory budget
# In texts of errors: of memory that ran out, of which cuBLAS has a number alone; of other faults of a device.
_MEMORY = re.compile("(?<!threadgroup )memory(?! access)|malloc|alloc_failed|cublas.* failed with code: 3(?![0-9])")
_DEVICE = re.compile("\\[metal|command buffer|cuda|cublas|cudnn|cu[a-z]+\\(.*\\) failed")


@contextmanager
def device_errors(last: bool = False) -> Iterator[None]:
    """OutOfMemory, or UserError where the device failed otherwise; MLX's RuntimeErrors for both differ in text only.

    last: what fails cannot be repeated, so there is no OutOfMemory.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if last:
            raise device_fault(error) from None
        if "no cuda implementation" in text:
            raise UserError(str(error), "Use --backend torch, or --device cpu.") from None
        if _MEMORY.search(text):
            mx.clear_cache()
            raise OutOfMemory(str(error).split("\n")[0]) from None
        if _DEVICE.search(text):
            raise device_fault(error) from None
        raise


@dataclass
class _Step:
    """A step that the device may still be computing. restore: makes it undone; None once that is settled.

    Its figures live longer: whoever has them would keep the weights before it and after it.
    """

    arrays: list[mx.array]  # its loss and its gradients' norm
    written: Any  # a tree of all that it computes
    restore: Callable[[], None] | None
    figures: list[float] | None = None  # of `arrays`, as soon as they are read

    def read(self) -> None:
        mx.eval(self.written)
        self.figures = [float(array) for array in self.arrays]

    def release(self) -> None:
        """Let go of all but the figures."""
        self.written = self.restore = None

    def undo(self) -> None:
        self.figures = None
        if self.restore is not None:
            self.restore()
        self.release()


@dataclass(frozen=True)
class _Figure:
    """A figure of a step. float() waits for the step, and raises OutOfMemory where it failed and was undone."""

    step: _Step
    number: int
    confirm: Callable[[], None]

    def __float__(self) -> float:
        if self.step.figures is None:
            self.confirm()
        if self.step.figures is None:
            raise OutOfMemory("the device failed after this step")
        return self.step.figures[self.number]


class Confirmation:
    """late: whether errors come late, as a GPU's do; elsewhere nothing is kept, and nothing waits.

    budget: bytes that training may take, 0 where it is not known. always: synchronize at each step, because the weights
    before it are too large to be kept through the next one.
    """

    def __init__(self, late: bool, budget: int, always: bool) -> None:
        self.late, self.budget, self.always = late, budget, always
        self._step: _Step | None = None  # launched, and not known to be written
        self._peak = 0  # before the last step was launched
        self.forget_sizes()

    def peak_memory(self) -> int:
        """MLX's peak since it was loaded, in bytes."""
        return max(self._peak, mx.get_peak_memory())

    def forget_sizes(self) -> None:
        """The next steps take other memory than those of the same sizes before."""
        self._largest = (0, 0, 0)

    @contextmanager
    def undoing(self, restore: Callable[[], None]) -> Iterator[None]:
        """Around a step. What fails in it undoes it, and the step before where that one is not confirmed."""
        try:
            with device_errors():
                yield
        except (RuntimeError, UserError) as error:
            previous, self._step = self._step, None
            (previous.undo if previous else restore)()
            if isinstance(error, OutOfMemory):
                error.undid_previous = previous is not None
            raise

    def wait(self) -> None:
        """Wait for the step before this one, whose error what is launched next will raise; the device is busy."""
        if self._step is not None:
            self._step.read()

    def launched(
        self, computed: Sequence[MicroBatchShape], figures: list[mx.array], written: Any, restore: Callable[[], None]
    ) -> Sequence[SupportsFloat]:
        """Take note of a step that the stream has accepted: the one before is confirmed. Returns its figures, lazy.

        computed: the sizes of its micro-batches.
        """
        if not self.late:
            return figures
        if self._step is not None:
            self._step.release()
        step = self._step = _Step(figures, written, restore)
        sizes = [(size.rows * size.width, size.width, size.labels) for size in computed]
        largest = tuple(map(max, zip(self._largest, *sizes, strict=True)))
        peak = mx.get_peak_memory()
        self._peak = max(self._peak, peak)
        mx.reset_peak_memory()  # it never falls by itself, and smaller micro-batches need not wait
        if self.always or largest != self._largest or peak > _SHORT * self.budget:
            self.confirm()
        self._largest = largest
        return [_Figure(step, number, self.confirm) for number in range(len(figures))]

    def confirm(self) -> None:
        """Wait for all that was launched. Where the last step was not written it is undone, and OutOfMemory raised."""
        step, self._step = self._step, None
        if step is None:
            return
        try:
            with device_errors():
                mx.synchronize()
                step.read()
        except (RuntimeError, UserError):
            step.undo()
            raise
        step.release()

    def settle(self, arrays: Any) -> None:
        """Wait for arrays and their errors."""
        mx.eval(arrays)
        if self.late:
            mx.synchronize()

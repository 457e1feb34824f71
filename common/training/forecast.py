"""The estimate of memory beside what a training takes: its first steps correct it, and all of it teaches the next."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.backend import Batch
from common.data.encode import Encoded
from common.display import gigabytes
from common.memory_terms import MicroBatchShape
from common.training.learned_memory import Observation
from common.training.memory_estimate import TrainingMemory
from common.training.planner import Work, leaner_plan, prediction
from common.training.short_memory import ShortMemory

_CORRECTED_AT = 3  # the step after which the estimate is corrected: AdamW's moments are there after the first
_WORTH_SAYING = 0.03  # of the estimate


@dataclass
class Forecast:
    """What is seen of a plan, until the plan changes.

    memory: None looks at nothing. replans: whether the plan may be changed by what was seen.
    """

    memory: TrainingMemory | None = None
    replans: bool = False
    validated: bool = False
    _steps: int = 0
    _seen: set[MicroBatchShape] = field(default_factory=set)
    _before: Observation | None = None  # of the plan that was given up

    def begin(self, rows: Sequence[Encoded], valid: Sequence[Encoded], short: ShortMemory) -> None:
        """Before the first step; valid: rows to validate on."""
        self._rows, self._valid, self._short, self._plan = rows, valid, short, short.current_plan

    def finished(self, batches: Sequence[Batch]) -> None:
        """A step was, with these micro-batches."""
        if self.memory is not None and self._as_begun():
            self._steps += 1
            self._seen.update(batch.shape for batch in batches)

    def corrects(self, step: int) -> bool:
        """Whether `correct` is due after this step."""
        return self.memory is not None and step == _CORRECTED_AT

    def correct(self, peak: int) -> None:
        """Say what the first steps tell, and change the plan where what is to come would not fit its budget."""
        seen = self.observation(peak)
        if self.memory is None or seen is None:
            return
        work = self._work(self.memory)
        corrected = self.memory.corrected(seen)
        before, now = (prediction(some, self._plan, work).peak for some in (self.memory, corrected))
        text = f"memory: estimated {gigabytes(before)}, now {gigabytes(now)} by the peak of {_CORRECTED_AT} steps"
        budget = self._plan.memory_budget
        leaner = leaner_plan(corrected, self._plan, work) if self.replans and now > budget else None
        if leaner:
            self._before = seen
            self._short.use_plan(leaner, f"{text}, and {gigabytes(budget)} may be taken")
        elif abs(now - before) > _WORTH_SAYING * before:
            self._short.observer.say(text)

    def observation(self, peak: int) -> Observation | None:
        """What the peak says of the estimate; None where too little was seen of the plan, or it was given up."""
        if self.memory is None or not self._as_begun() or self._steps < _CORRECTED_AT or peak <= 0:
            return self._before
        tokens = self._plan.micro_batch_tokens
        validation = self._work(self.memory).longest_validation(tokens) if self.validated else None
        return self.memory.observed(self._plan, self._seen, validation, peak)

    def _work(self, memory: TrainingMemory) -> Work:
        return Work.of(self._rows, memory.recipe, self._valid)

    def _as_begun(self) -> bool:
        return self._short.current_plan == self._plan

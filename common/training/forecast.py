"""The estimate of memory, corrected by what a training's own first steps have taken."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.backend import Batch, Memory
from common.data.encode import Encoded
from common.display import gigabytes
from common.memory_terms import MicroBatchShape
from common.training.memory_estimate import TrainingMemory
from common.training.planner import Work, leaner_plan, prediction
from common.training.short_memory import ShortMemory

_STEPS = 3  # that are looked at: AdamW's moments are there after the first
_WORTH_SAYING = 0.03  # of the estimate


@dataclass
class Forecast:
    """Corrects the plan once, after the first steps of this process, where what is to come would not fit its budget.

    memory: None looks at nothing. valid: rows to validate on.
    """

    memory: TrainingMemory | None
    rows: Sequence[Encoded]
    valid: Sequence[Encoded]
    short: ShortMemory
    _seen: set[MicroBatchShape] = field(default_factory=set)
    _steps: int = 0

    def finished(self, batches: Sequence[Batch], memory: Memory) -> None:
        """A step was, with these micro-batches."""
        self._steps += 1
        if self.memory is None or self._steps > _STEPS:
            return
        self._seen.update(batch.shape for batch in batches)
        if self._steps == _STEPS:
            self._correct(self.memory, memory.peak)

    def _correct(self, memory: TrainingMemory, peak: int) -> None:
        state = self.short.state
        plan = self.short.plan.model_copy(
            update={
                "micro_batch_tokens": state.micro_batch_tokens,
                "gradient_checkpointing": state.gradient_checkpointing,
            }
        )
        work = Work.of(self.rows, memory.recipe, self.valid)
        validated = work.longest_validation(plan.micro_batch_tokens) if state.start_valid_loss is not None else None
        corrected = memory.corrected(plan, self._seen, validated, peak)
        before, now = (prediction(some, plan, work).peak for some in (memory, corrected))
        text = f"memory: estimated {gigabytes(before)}, now {gigabytes(now)} by the peak of the first {_STEPS} steps"
        if now > plan.memory_budget and (leaner := leaner_plan(corrected, plan, work)):
            self.short.use_plan(leaner, f"{text}, and {gigabytes(plan.memory_budget)} may be taken")
        elif abs(now - before) > _WORTH_SAYING * before:
            self.short.observer.say(text)

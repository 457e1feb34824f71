"""The training loop, one for both backends."""

import math
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from common.backend import Backend, Batch, OutOfMemory, StepResult, weight_sum
from common.data.batching import micro_batches, step_rows
from common.data.encode import Encoded
from common.errors import AtOdds, UserError
from common.recipe import Plan, Recipe
from common.training import checkpoint
from common.training.busy_cpu import BusyCpu
from common.training.checkpoint import State
from common.training.faults import not_finite, unsaved
from common.training.forecast import Forecast
from common.training.metrics import Metrics, timed
from common.training.observer import Observer
from common.training.pending import Pending
from common.training.planner import Work
from common.training.schedule import learning_rate
from common.training.short_memory import ShortMemory
from common.training.validation import Validation, no_better, nothing_to_learn


class Interrupted(Exception):
    """Training stopped at the user's wish, after a step that was finished and saved."""


@dataclass
class TrainingLoop:
    """A run's training, from `state` on: steps, validations, checkpoints and metrics.

    A step is saved before it is validated, so that a stop or a kill during a long validation loses nothing. A
    validation that was interrupted is repeated when the run continues.

    valid: rows to validate on; without any, nothing is validated. run: folder of checkpoints/ and metrics.jsonl.
    seconds: gets the time of training, validation and saving. forecast: of memory, which first steps correct.
    """

    backend: Backend
    recipe: Recipe
    plan: Plan
    rows: Sequence[Encoded]
    valid: Sequence[Encoded]
    run: Path
    state: State
    observer: Observer
    seconds: dict[str, float] = field(default_factory=dict)
    forecast: Forecast = field(default_factory=Forecast)
    finish: bool = False  # no step more: what has been trained is all

    def train(self) -> State:
        """The state after the recipe's last step.

        Raises Interrupted after a requested stop, UserError for a loss that is not finite or memory that no smaller
        micro-batch saves.
        """
        self.seconds.setdefault("train", 0.0)
        self._pending: Pending | None = None
        self._skipped, self._warm = False, False  # whether a step was; whether this process has finished one
        self._cut = 0  # tokens of a micro-batch when rows were last split
        self._expected: tuple[int, bool] | None = None  # these, and whether layers were computed twice
        last = self.state.step if self.finish else self.recipe.steps
        if self.finish:
            self.observer.say(f"--finish: training ends at step {last} of {self.recipe.steps}")
        self._saved_at, self._refused = time.monotonic(), False
        self._busy_cpu = BusyCpu(self.observer)
        self._memory = ShortMemory(self.backend, self.plan, self.state, self.observer)
        self.forecast.begin(self.rows, self.valid, self._memory)
        self._validation = Validation(
            self.backend, self.recipe, self.plan, self.valid, self.run, self.state, self._memory
        )
        unvalidated = self.state.step > self.state.evaluated and self._evaluates(self.state.step)
        metrics = Metrics(self.run / "metrics.jsonl", self.state.step, unvalidated, self.observer.warn)
        with closing(metrics) as self._metrics:
            self._expect()
            if unvalidated:
                self._validate(saved=True)
            elif not self.state.step and self.valid:
                self._validate_start()
            ready = self._split(self.state.step + 1)
            for number in range(self.state.step + 1, last + 1):
                if no_better(self.state, self.recipe):
                    self._stop_early()
                    break
                ready = self._launch(number, *self._as_cut_now(number, *ready))
                stop, evaluates = self.observer.stop_requested(), self._evaluates(number)
                saves = stop or self._saves(number)
                corrects = self.forecast.corrects(number)
                if evaluates or saves or corrects or not self._warm:  # the first step's time is its own: it warms up
                    self._finish_pending()
                if corrects:
                    self.forecast.correct(self.backend.memory().peak)
                saved = saves and self._save(stop)
                if stop:
                    raise Interrupted(self.run)
                if evaluates:
                    self._validate(saved)
            if self._refused:
                self._save(again="so the run cannot be lengthened from this step")
        return self.state

    def _evaluates(self, step: int) -> bool:
        last = self.finish or step == self.recipe.steps
        return bool(self.valid) and (last or step % self.recipe.eval_every == 0)

    def _saves(self, step: int) -> bool:
        limit = 60 * self.plan.save_minutes
        late = limit > 0 and time.monotonic() - self._saved_at >= limit
        return late or step == self.recipe.steps or step % self.plan.save_every == 0

    def _expect(self) -> None:
        """Tell the backend what is to come, once the size of micro-batches is known, or where memory was short."""
        size, twice = self.state.micro_batch_tokens, self.state.gradient_checkpointing
        if self._expected == (size, twice):
            return
        self._expected = size, twice
        shapes = cache(lambda: Work.of(self.rows, self.recipe, self.valid).expected(self.recipe.steps, self.plan, size))
        self.backend.expect(shapes)
        if self.forecast.memory is not None:
            self.forecast.memory = self.forecast.memory.expecting(self.plan, shapes)

    def _split(self, step: int) -> tuple[list[Encoded], list[Batch]]:
        """The step's rows, and the same as micro-batches; none beyond the last step."""
        if step > self.recipe.steps:
            return [], []
        self._cut = self.state.micro_batch_tokens
        indices = step_rows(len(self.rows), self.recipe.batch_size, self.recipe.seed, step)
        rows = [self.rows[i] for i in indices]
        return rows, self._micro_batches(rows)

    def _micro_batches(self, rows: Sequence[Encoded]) -> list[Batch]:
        self._expect()
        return micro_batches(rows, self.state.micro_batch_tokens, self.plan.device, self.plan.ranks)

    def _launch(self, step: int, rows: list[Encoded], batches: list[Batch]) -> tuple[list[Encoded], list[Batch]]:
        """Start the step, and finish the one before while the device computes. Returns the next step's rows."""
        if not weight_sum(batches):
            return self._skip(step)
        started, rate = time.perf_counter(), learning_rate(self.recipe, step)
        try:
            result, batches = self._step(step, rate, rows, batches)
        except UserError as error:  # the step before this one is complete
            if self._pending is not None and not isinstance(error, AtOdds):
                with suppress(OutOfMemory):
                    self._finish(self._pending, started)
            raise
        threads = self.backend.cpu_threads()
        before, self._pending = self._pending, Pending(step, rate, rows, batches, result, started, threads)
        ready = self._split(step + 1)
        if before is not None:
            self._finish(before, started)
        return ready

    def _as_cut_now(self, step: int, rows: list[Encoded], batches: list[Batch]) -> tuple[list[Encoded], list[Batch]]:
        """What `_split` gave, or gives now that micro-batches are smaller than then."""
        return (rows, batches) if self._cut == self.state.micro_batch_tokens else self._split(step)

    def _step(
        self, step: int, rate: float, rows: list[Encoded], batches: list[Batch]
    ) -> tuple[StepResult, list[Batch]]:
        """The step, repeated in smaller micro-batches while it runs out of memory: the mathematics stays the same."""
        while True:
            try:
                return self.backend.train_step(batches, rate, step), batches
            except OutOfMemory as error:
                undid_previous = error.undid_previous  # here the error ends: it holds what the step had computed
            if undid_previous and self._pending is not None:
                self._repeat(self._pending)
            else:
                self._memory.use_less(batches, f"step {step} ran out of memory")
            batches = self._micro_batches(rows)

    def _repeat(self, step: Pending) -> None:
        """Do the step again, which was undone: the device had not written what it computed."""
        self._pending = None
        self._memory.use_less(step.batches, f"step {step.number} ran out of memory")
        result, batches = self._step(step.number, step.rate, step.rows, self._micro_batches(step.rows))
        self._pending = replace(step, result=result, batches=batches)

    def _skip(self, step: int) -> tuple[list[Encoded], list[Batch]]:
        """Pass over a step whose rows all weigh nothing: only the schedule goes on. Returns the next step's rows."""
        self._finish_pending()
        if not self._skipped:
            self.observer.warn(f"step {step} is skipped: its loss weights sum to 0, as those of later steps may")
        self._skipped, self.state.step = True, step
        return self._split(step + 1)

    def _finish_pending(self) -> None:
        self._wait()
        if self._pending is not None:
            self._finish(self._pending, time.perf_counter())
            self._pending = None

    def _wait(self) -> None:
        """Wait for the step that the device may still be computing, and repeat it while it was not written."""
        while self._pending is not None:
            with suppress(OutOfMemory):
                self._pending.read()
                return
            self._repeat(self._pending)

    def _finish(self, step: Pending, ended: float) -> None:
        """Wait for the step, check its figures, report them."""
        loss, norm = step.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise not_finite(self.run, step.number, step.rows)
        if 0.0 in (loss, norm) and not self._nothing_to_learn(step.rows):
            raise not_finite(self.run, step.number, step.rows, is_="exactly 0")
        seconds = ended - step.started
        self.state.count(step.number, step.result, loss, seconds, timed=self._warm)
        self.seconds["train"] += seconds
        self._warm, memory = True, self.backend.memory()
        line = {
            "step": step.number,
            "loss": loss,
            "label_tokens": step.result.label_tokens,
            "tokens": step.result.tokens,
            "learning_rate": step.rate,
            "grad_norm": norm,
            "seconds": seconds,
            "memory": memory.used,
            "swap": memory.swap,
        }
        self._busy_cpu.note(line, step.threads)
        self._metrics.write(line)
        self.observer.step(line, memory)
        self._memory.watch_swap(memory, step.batches)
        self.forecast.finished(step.batches)

    def _save(self, stop: bool = False, again: str = "it is tried again later") -> bool:
        """Whether the checkpoint was written. Where the disk refuses it, it is tried again when the next is due.

        Raises UserError at a `stop`, for which there is no next one.
        """
        self._saved_at = time.monotonic()
        try:
            with timed(self.seconds, "save"):
                state, adapter, optimizer = self.state, self.backend.get_adapter(), self.backend.get_optimizer()
                # one more until the validation of this step is known: where it is not finite, this one is removed
                keep = self.plan.keep_checkpoints + (state.evaluated < state.step and self._evaluates(state.step))
                checkpoint.save(self.run, state, adapter, optimizer, self.recipe.hash(), keep)
        except OSError as error:
            fault = unsaved(self.run, error)
            if stop:
                raise fault from None
            self.observer.warn(f"no checkpoint of step {self.state.step}: {fault.what}; {again}")
            self._refused = True
            return False
        self._saved_at, self._refused = time.monotonic(), False
        return True

    def _validate(self, saved: bool) -> None:
        """Validate, and complete the checkpoint where the step was `saved`. Raises Interrupted for a stop."""
        with timed(self.seconds, "evaluate"):
            done = self._evaluate()
        if not done:
            if not saved:
                self._save(stop=True)
            raise Interrupted(self.run)
        if saved:
            try:
                checkpoint.add_evaluation(self.run, self.state, self.plan.keep_checkpoints)
            except OSError as error:
                self.observer.warn(f"{unsaved(self.run, error).what}; a resumed run repeats this validation")

    def _validate_start(self) -> None:
        """Validate before the first step, unless that is known: what training is to improve on."""
        with timed(self.seconds, "evaluate"):
            loss = self.state.start_valid_loss
            if loss is None:
                loss = self._validation.loss(self.observer.stop_requested)
            if loss is None:
                raise Interrupted(self.run)
            self.state.start_valid_loss = loss
            self._report_validation(loss)

    def _evaluate(self) -> bool:
        """Validate after `state.step`, keep the adapter if it is the best; False where a stop was asked for."""
        loss = self._validation.loss(self.observer.stop_requested)
        if loss is None:
            return False
        self._validation.keep(loss)
        self._report_validation(loss)
        return True

    def _report_validation(self, loss: float) -> None:
        line = {"step": self.state.step, "valid_loss": loss}
        self._metrics.write(line)
        self.forecast.validated = True
        self.observer.evaluation(line)

    def _stop_early(self) -> None:
        """What has been trained is saved, and the schedule's other steps are left out."""
        if checkpoint.latest_step(self.run) != self.state.step:
            self._save()
        state = self.state
        self.observer.say(
            f"stopped at step {state.step} of {self.recipe.steps}: the validation loss was {state.best_valid_loss:.4f} "
            f"at step {state.best_step}, and not lower in the {self.recipe.patience} validations since (--patience)"
        )

    def _nothing_to_learn(self, rows: Sequence[Encoded]) -> bool:
        self._wait()  # an error of the next step says nothing of these rows
        return nothing_to_learn(self.backend, rows, self.plan.device)

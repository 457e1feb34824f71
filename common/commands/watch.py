"""How a training is watched: it is shown, the model is asked at each validation, and alarms are raised.

A step of `train`. What fails here costs no training.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.backend import Backend, Memory
from common.commands.prepare import Job
from common.data.sample_prompts import given_prompts, trained_answers
from common.display import Display
from common.documents import read_json_lines
from common.evaluation.alarms import Alarm, Alarms
from common.evaluation.drift import Quiz
from common.evaluation.samples import Samples
from common.inference.backend_chat import ChatFormat, backend_chat_model, without_hidden
from common.report.tracking import Tracking
from common.run_fields import AlarmRecord
from common.training.checkpoint import State
from common.training.faults import NotFinite, Unwritten
from common.training.loop import Interrupted
from common.training.metrics import Metrics
from common.training.resume import resume_command
from common.training.rollback import MOST, RolledBack
from common.training.setup import ENOUGH
from common.training.validation import no_better, worse_than_start

FILE = "samples.jsonl"


class Collapsed(Interrupted):
    """Training stopped, after a step that was saved, at a sign of collapse. Of what was seen, and the remedy."""


@dataclass
class Watcher:
    """The loop's observer. stops: the stop signals that have come, as `stop_signals` yields them."""

    job: Job
    display: Display
    stops: Sequence[int]
    alarms: Alarms
    tracking: Tracking
    ask: list[Callable[[int], None]] = field(default_factory=list)  # what is asked at a validation, until it fails
    collapse: list[Alarm] = field(default_factory=list)  # what was raised, where --on-collapse is more than a warning

    def step(self, line: dict, memory: Memory) -> None:
        self.display.step(line, memory)
        self.tracking.step(line, memory)
        self.raise_all(line["step"], self.alarms.step(line))

    def evaluation(self, line: dict) -> None:
        self.display.evaluation(line)
        self.tracking.evaluation(line)
        self.raise_all(line["step"], self.alarms.validation(line))
        for ask in [*self.ask]:
            self.ask.remove(ask)
            with self.display.optional("the model is not asked any more during training"):
                ask(line["step"])
                self.ask.append(ask)

    def say(self, text: str) -> None:
        self.display.say(text)

    def warn(self, text: str) -> None:
        self.display.warn(text)

    def stop_requested(self) -> bool:
        return bool(self.stops or self.collapse)

    @contextmanager
    def rolling_back(self, state: State) -> Iterator[None]:
        """Raises RolledBack for a training that has collapsed, where that was asked for and can help.

        At once for a run that was stopped or killed between an alarm and its rollback.
        """
        if self.job.options.on_collapse == "rollback" and not self.job.options.finish:
            known = [alarm for alarm in self.job.run.record.alarms if not _recovered(alarm, state)]
            self.collapse = [Alarm(a.name, a.seen, a.cause, a.remedy, a.since, a.quote) for a in known]
            if self.collapse and not self.is_over(state) and self._can_be_helped():
                raise self._rolled_back()
            self.collapse = []
        try:
            yield
        except (Interrupted, NotFinite) as error:
            diverged = isinstance(error, NotFinite) and not isinstance(error, Unwritten)
            diverged = diverged and (state.step > 0 or state.start_valid_loss is not None)
            asked = self.job.options.on_collapse == "rollback" and not (self.stops or self.job.options.finish)
            if asked and (self.collapse or diverged) and self._can_be_helped():
                if isinstance(error, NotFinite):
                    self.warn(error.what)
                raise self._rolled_back(state.step + 1) from None
            if isinstance(error, Interrupted) and self.collapse and not self.stops:
                raise self._collapsed(state) from None
            raise

    def is_over(self, state: State) -> bool:
        """Whether only the export is left. Of the last step an alarm may be from the validation before it."""
        complete = state.step >= self.job.recipe.steps and (state.evaluated >= state.step or not self.job.valid)
        return complete or no_better(state, self.job.recipe)

    def _collapsed(self, state: State) -> Collapsed:
        first, again = self.collapse[0], resume_command(self.job.run, self.job.options)
        ways = [f"Export the best adapter as it is: {again} --finish", f"Continue all the same: {again}"]
        if self.job.options.on_collapse == "stop" and all(alarm.of_rate for alarm in self.collapse):
            ways.insert(0, f"Continue from the best adapter at half the rate: {again} --on-collapse rollback")
        what = f"Training was stopped after step {state.step}, and saved, because {first.seen}."
        return Collapsed(what, f"Start a new run: {first.remedy}. " + ". ".join(ways))

    def _can_be_helped(self) -> bool:
        """Whether a lower learning rate may help against all that was seen, and was not tried too often."""
        if any(not alarm.of_rate for alarm in self.collapse):
            self.warn("not rolled back: a lower learning rate does not help against this")
            return False
        if len(self.job.run.record.rollbacks) == MOST:
            self.warn(f"not rolled back again, after {MOST} times: look at the rows with check-data")
            return False
        return True

    def _rolled_back(self, since: int = sys.maxsize) -> RolledBack:
        return RolledBack(self.job.run, min([since, *(alarm.since for alarm in self.collapse)]))

    def raise_all(self, step: int, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.display.warn(str(alarm))
        if self.job.options.on_collapse != "warn":
            self.collapse += alarms
        if alarms:
            with self.display.optional("run.json lacks an alarm"):
                quotes = {"quote": ""} if self.job.options.no_text else {}
                before = self.job.run.record.alarms
                self.job.run.update(
                    alarms=[*before, *(AlarmRecord(step=step, **vars(alarm) | quotes) for alarm in alarms)]
                )


def _recovered(alarm: AlarmRecord, state: State) -> bool:
    """Whether a better validation followed the alarm."""
    return (state.best_step or 0) > max(alarm.step, alarm.since) and not worse_than_start(state)


@contextmanager
def watching(
    job: Job, backend: Backend, state: State, display: Display, stops: Sequence[int], tracking: Tracking
) -> Iterator[Watcher]:
    """The observer of the loop that continues from `state`."""
    watcher = Watcher(job, display, stops, _alarms_until(job, state), tracking)
    shown = without_hidden(job.encoder.tokenizer)
    rows = [replace(prompt, answer=shown(prompt.answer)) for prompt in job.prompts]
    prompts = [*given_prompts(job.options.sample_prompt, rows), *rows]
    with ExitStack() as stack:
        if prompts and job.valid:
            with display.optional("the model is not asked during training"):
                model = backend_chat_model(backend, chat_format(job), "", True)
                lines = Metrics(job.run.path / FILE, state.step, state.step > state.evaluated, display.warn)
                stack.enter_context(closing(lines))
                samples = Samples(
                    model,
                    prompts,
                    lines,
                    texts=not job.options.no_text,
                    trained=trained_answers(job.train, job.encoder.tokenizer),
                )
                adapted = job.recipe.method != "full"
                asked = adapted or not state.step  # a weight that has been trained tells nothing of the base's
                quiz = Quiz.of(job.encoder.tokenizer, job.recipe.thinking, adapted) if asked else None
                watcher.ask.append(lambda step: _ask(step, samples, quiz, backend, watcher, state))
        yield watcher
        _say_forgotten(watcher.alarms.quiz, state.best_step or state.step, display)


def _say_forgotten(quiz: dict[int, float], step: int, display: Display) -> None:
    """How well the model of that step knows the quiz, or of the last one that was asked; not without one before."""
    step = step if step in quiz else max(quiz, default=0)
    if step and 0 in quiz:
        display.say(
            f"Common knowledge, outside of the data: its right answers have a loss of {quiz[step]:.2f} at step {step}, "
            f"and had {quiz[0]:.2f} before training"
        )


def _ask(step: int, samples: Samples, quiz: Quiz | None, backend: Backend, watcher: Watcher, state: State) -> None:
    last = watcher.is_over(state)
    answers = samples.ask(step, watcher.display, watcher.stop_requested, last)
    watcher.tracking.answers(answers)
    watcher.raise_all(step, watcher.alarms.answers(step, answers, last))
    if quiz and (answers or not step) and not watcher.stop_requested():
        began = time.monotonic()
        drift = quiz.ask(backend)
        samples.spend(time.monotonic() - began)
        samples.keep({"step": step, "drift": drift.nats, "quiz_loss": drift.loss})
        watcher.raise_all(step, watcher.alarms.drift(step, drift.nats, drift.loss))


def _alarms_until(job: Job, state: State) -> Alarms:
    """Having seen the lines of a resumed run: what they raised is not raised again."""
    alarms = Alarms(job.recipe.warmup_steps, not job.recipe.patience and len(job.valid) >= ENOUGH)
    lines = [line for name in ("metrics.jsonl", FILE) for line in _lines(job.run.path / name, state.step)]
    lines.sort(key=lambda line: line["step"])  # as they came: of a step, its figures before its answers
    for line in lines:
        alarms.see(line)
    kinds = {"answer": str, "reference": str, "ended": bool}
    answers = [line for line in lines if all(isinstance(line.get(name), kind) for name, kind in kinds.items())]
    for step in dict.fromkeys(line["step"] for line in answers):
        alarms.answers(step, [line for line in answers if line["step"] == step])
    alarms.known |= {alarm.name for alarm in job.run.record.alarms}
    return alarms


def _lines(file: Path, step: int) -> list[dict[str, Any]]:
    """Those until `step`."""
    found = read_json_lines(file, "Remove it: no result depends on it.") if file.exists() else []
    return [line for line in found if isinstance(line.get("step"), int) and line["step"] <= step]


def chat_format(job: Job) -> ChatFormat:
    """How the model is prompted, as it is trained."""
    served, think = job.served, job.recipe.thinking == "keep"
    return ChatFormat(job.base.model.path, served.template, served.stops, think, tokenizer=job.encoder.tokenizer)

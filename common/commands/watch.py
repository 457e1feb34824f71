"""How a training is watched: it is shown, the model is asked at each validation, and alarms are raised.

A step of `train`. What fails here costs no training.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field

from common.backend import Backend, Memory
from common.commands.prepare import Job
from common.data.sample_prompts import given_prompts, trained_answers
from common.display import Display
from common.documents import read_json_lines
from common.evaluation.alarms import Alarm, Alarms
from common.evaluation.drift import Quiz
from common.evaluation.samples import LONGEST, Samples
from common.inference.backend_chat import ChatFormat, backend_chat_model
from common.run_fields import AlarmRecord
from common.training.checkpoint import State
from common.training.faults import NotFinite
from common.training.loop import Interrupted
from common.training.metrics import Metrics
from common.training.rollback import MOST, RolledBack

FILE = "samples.jsonl"


@dataclass
class Watcher:
    """The loop's observer. stops: the stop signals that have come, as `stop_signals` yields them."""

    job: Job
    display: Display
    stops: Sequence[int]
    alarms: Alarms
    ask: list[Callable[[int], None]] = field(default_factory=list)  # what is asked at a validation, until it fails
    collapsed: bool = False  # and --on-collapse is more than a warning
    curable: bool = False  # by a lower learning rate

    def step(self, line: dict, memory: Memory) -> None:
        self.display.step(line, memory)
        self.raise_all(self.alarms.step(line))

    def evaluation(self, line: dict) -> None:
        self.display.evaluation(line)
        self.raise_all(self.alarms.validation(line))
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
        return bool(self.stops) or self.collapsed

    @contextmanager
    def rolling_back(self, state: State) -> Iterator[None]:
        """Raises RolledBack in place of the exception that ends a collapsed training, where that was asked for."""
        try:
            yield
        except (Interrupted, NotFinite) as error:
            if self._rolls_back(error, state):
                raise RolledBack(self.job.run.path) from None
            raise

    def _rolls_back(self, error: Exception, state: State) -> bool:
        """Whether the training that `error` ends can be saved by a lower learning rate."""
        diverged = isinstance(error, NotFinite) and (state.step > 0 or state.start_valid_loss is not None)
        if self.job.options.on_collapse != "rollback" or self.stops or not (self.collapsed or diverged):
            return False
        if not (self.curable or diverged):
            self.warn("not rolled back: a lower learning rate does not help against this")
            return False
        if len(self.job.run.record.rollbacks) == MOST:
            self.warn(f"not rolled back again, after {MOST} times: look at the rows with check-data")
            return False
        return True

    def raise_all(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            self.display.warn(str(alarm))
            self.collapsed = self.job.options.on_collapse != "warn"
            self.curable |= alarm.of_rate
        if alarms:
            with self.display.optional("run.json lacks an alarm"):
                before = self.job.run.record.alarms
                self.job.run.update(alarms=[*before, *(AlarmRecord(**vars(alarm)) for alarm in alarms)])


@contextmanager
def watching(job: Job, backend: Backend, state: State, display: Display, stops: Sequence[int]) -> Iterator[Watcher]:
    """The observer of the loop that continues from `state`."""
    watcher = Watcher(job, display, stops, _alarms_until(job, state))
    given = given_prompts(job.options.sample_prompt, job.prompts)
    prompts = [*given, *job.prompts[: max(0, len(job.prompts) - len(given))]]
    with ExitStack() as stack:
        if prompts and job.valid:
            with display.optional("the model is not asked during training"):
                longest = max(prompt.tokens for prompt in prompts) + 2 * LONGEST
                model = backend_chat_model(backend, chat_format(job, longest), "", True)
                lines = Metrics(job.run.path / FILE, state.step, state.step > state.evaluated, display.warn)
                stack.enter_context(closing(lines))
                samples = Samples(
                    model,
                    prompts,
                    lines,
                    texts=not job.options.no_text,
                    trained=trained_answers(job.train, job.encoder.tokenizer),
                )
                base_is_there = job.recipe.method != "full"
                quiz = Quiz.of(job.encoder.tokenizer, job.recipe.thinking) if base_is_there else None
                watcher.ask.append(lambda step: _ask(step, samples, quiz, backend, watcher))
        yield watcher


def _ask(step: int, samples: Samples, quiz: Quiz | None, backend: Backend, watcher: Watcher) -> None:
    answers = samples.ask(step, watcher.display, watcher.stop_requested)
    watcher.raise_all(watcher.alarms.answers(step, answers))
    if answers and quiz:
        began = time.monotonic()
        drift = quiz.ask(backend)
        samples.spend(time.monotonic() - began)
        samples.keep({"step": step, "drift": drift.nats, "quiz_loss": drift.loss})
        watcher.raise_all(watcher.alarms.drift(step, drift.nats))


def _alarms_until(job: Job, state: State) -> Alarms:
    """Having seen the lines of a resumed run: what they raised is not raised again."""
    alarms = Alarms(job.recipe.warmup_steps)
    file = job.run.path / "metrics.jsonl"
    for line in read_json_lines(file, "Remove it: no result depends on it.") if file.exists() else []:
        if isinstance(line.get("step"), int) and line["step"] <= state.step:
            alarms.see(line)
    alarms.known |= {alarm.name for alarm in job.run.record.alarms}
    return alarms


def chat_format(job: Job, context: int) -> ChatFormat:
    """How the model is prompted, as it is trained. context: tokens of prompt and answer together."""
    served, think = job.served, job.recipe.thinking == "keep"
    return ChatFormat(job.base.model.path, served.template, served.stops, think, context)

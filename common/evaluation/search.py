"""`tune`: trainings with different hyperparameters, one after another, each drawn by what those before it came to.

Every trial stands in the study's file from its beginning, and its checkpoints lie in a folder of its own, so a search
that was stopped or killed continues where it was.
"""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.backend import Memory
from common.display import Display
from common.errors import UserError
from common.evaluation.search_space import Settings, described
from common.evaluation.study import TENTHS, Outcome, Study, Trial, Unkept
from common.training.faults import NotFinite
from common.training.loop import Interrupted
from common.training.observer import DisplayObserver
from common.training.trials import Trials

SEEDS = (1, 2)  # added to --seed where the best trial and the automatic one are repeated
_REPETITIONS_SHARE = 1 / 3  # of the budget that is kept for that, at most
_KEPT_SECONDS = 10.0  # after which the time of a training is kept: a killed one counts too
_MARGIN = 1.15  # a trial ends after the step during which its time is up


@dataclass(frozen=True)
class Limits:
    """Of a search, over all its processes. seconds: of training."""

    trials: float = math.inf
    seconds: float = math.inf


@dataclass
class _Watcher:
    """The observer of a training: keeps what it came to, prunes it, ends it with the budget.

    trial: None for a repetition, which is not pruned. save: takes what is kept.
    """

    shown: DisplayObserver
    seconds: float  # after which it ends
    length: int  # steps of the recipe
    kept: dict[str, Any]  # as of Outcome
    save: Callable[[dict[str, Any]], None]
    trial: Trial | None = None
    pruned: bool = False

    def __post_init__(self) -> None:
        self.begin()
        self._before = self.kept.get("seconds", 0.0)
        self._reported = self.trial.reported if self.trial else 0

    def begin(self) -> None:
        """Its time is counted from here on."""
        self._began = self._kept_at = time.monotonic()

    def keep(self, **figures: Any) -> None:
        self._kept_at = time.monotonic()
        self.kept |= figures | {"seconds": round(self._before + self._kept_at - self._began, 2)}
        self.save(self.kept)

    def step(self, line: dict, memory: Memory) -> None:
        self.kept["steps"] = line["step"]
        self.shown.step(line, memory)
        if time.monotonic() - self._kept_at > _KEPT_SECONDS:
            self.keep()

    def evaluation(self, line: dict) -> None:
        self.shown.evaluation(line)
        loss, step = line["valid_loss"], line["step"]
        if not step:
            return
        best = self.kept.get("loss")
        self.keep(**({"loss": loss, "step": step} if best is None or loss < best else {}))
        tenth = TENTHS * step // self.length
        while self.trial is not None and self._reported < tenth < TENTHS:
            self._reported += 1
            self.pruned |= self.trial.report(self.kept["loss"], self._reported)

    def say(self, text: str) -> None:
        self.shown.say(text)

    def warn(self, text: str) -> None:
        self.shown.warn(text)

    def stop_requested(self) -> bool:
        return self.pruned or self.shown.stop_requested() or time.monotonic() > self._began + self.seconds


@dataclass(frozen=True)
class Search:
    """A study's trials, until the limits are reached or a stop is asked for.

    folder: of the search. stops: the stop signals that have come.
    """

    study: Study
    trials: Trials
    folder: Path
    limits: Limits
    display: Display
    stops: Sequence[int]

    def run(self) -> None:
        """Do the trials; then repeat the best and the automatic one with other seeds, where the best seems better.

        Ends where two trials in a row fail. Raises UserError where the automatic recipe cannot be trained.
        """
        for outcome in self.study.ended():  # their process may have been killed before it did
            self._clean(_name(outcome.number))
        while self._continues() and self._do(self.study.next()):
            pass
        for more in SEEDS:
            for outcome in self._pair():
                known = self.study.repetitions().get((outcome.number, more))
                done = known is not None and known.how != "unfinished"
                if not done and not self._repeat(outcome, more, known):
                    return

    def _continues(self) -> bool:
        finite = self.study.space.rates is None
        enough = len(self.study.ended()) >= self.limits.trials or self.left() <= self._reserve()
        return not (self.stops or enough or (finite and not self.study.untried()))

    def left(self) -> float:
        """Seconds of the budget."""
        every = [*self.study.outcomes(), *self.study.repetitions().values()]
        return self.limits.seconds - sum(each.seconds for each in every)

    def _reserve(self) -> float:
        """Seconds that are kept for the repetitions."""
        seconds = _MARGIN * len(SEEDS) * sum(outcome.seconds for outcome in self._pair())
        return seconds if seconds <= _REPETITIONS_SHARE * self.limits.seconds < math.inf else 0.0

    def _pair(self) -> list[Outcome]:
        """The best trial and the automatic one, where both are complete and the first is better; else none."""
        found, best = self.study.outcomes(), self.study.best()
        delta = self.study.space.options.min_delta
        complete = best is not None and found[0].how == "complete"
        return [best, found[0]] if best and complete and best.beats(found[0], delta) else []

    def _do(self, trial: Trial) -> bool:
        """Train with the trial's settings; False where the search ends: at a stop, with the budget, failing again."""
        before = self.study.ended()
        named = f"trial {trial.number}{' (the automatic recipe)' if trial.number == 1 else ''}"
        total = f" of {self.limits.trials:.0f}" if self.limits.trials < math.inf else ""
        best = self.study.best()
        so_far = f"; best so far {best.value:.4f}" if best else ""
        left, reserve = self.left(), self._reserve()
        time_left = f"; {left / 60:.1f} min left" if left < math.inf else ""
        self.display.say(f"{named}{total}: {described(trial.settings)}{so_far}{time_left}")
        watcher = self._watcher(trial.settings, left - reserve, dict(trial.kept), trial.keep, trial)
        try:
            how = self._train(trial.settings, 0, _name(trial.number), watcher)
        except UserError as error:
            if watcher.stop_requested() or not before or isinstance(error, Unkept):
                raise
            self.display.warn(f"{named} failed: {error.what}")
            how = "failed"
        if how == "unfinished":
            return False
        self.study.tell(trial, watcher.kept | {"how": how})
        self._clean(_name(trial.number))
        self._show(named, self.study.outcomes()[-1])
        if how == "failed" and before[-1].how == "failed":
            self.display.warn("the search ends: two trials in a row failed")
            return False
        return True

    def _repeat(self, outcome: Outcome, more: int, known: Outcome | None) -> bool:
        """Train a trial again with `more` added to the seed; False where it was stopped."""
        if self.stops or self.left() <= 0:
            return False
        named = f"trial {outcome.number} with seed {self.study.space.options.seed + more}"
        self.display.say(f"{named}: is it better than the automatic recipe by more than noise?")

        def save(kept: dict[str, Any]) -> None:
            self.study.keep_repetition(outcome.number, more, kept)

        kept = {"seconds": known.seconds} if known else {}
        watcher = self._watcher(outcome.settings, self.left(), kept, save)
        try:
            how = self._train(outcome.settings, more, _name(outcome.number, more), watcher)
        except UserError as error:
            if watcher.stop_requested() or isinstance(error, Unkept):
                raise
            self.display.warn(f"{named} failed: {error.what}")
            how = "failed"
        if how == "unfinished":
            return False
        save(watcher.kept | {"how": how})
        self._clean(_name(outcome.number, more))
        self._show(named, self.study.repetitions()[outcome.number, more])
        return True

    def _watcher(
        self,
        settings: Settings,
        seconds: float,
        kept: dict[str, Any],
        save: Callable[[dict[str, Any]], None],
        trial: Trial | None = None,
    ) -> _Watcher:
        length = self.trials.recipe(self.study.space.with_settings(settings)).steps
        return _Watcher(DisplayObserver(self.display, self.stops), seconds, length, kept, save, trial)

    def _train(self, settings: Settings, more: int, name: str, watcher: _Watcher) -> str:
        """How the training ended, as of Outcome. more: added to the seed."""
        options = self.study.space.with_settings(settings)
        options = options.model_copy(update={"seed": options.seed + more})
        try:
            with self.display.training(watcher.length, 0):
                state = self.trials.train(options, self.folder / name, watcher, watcher.begin)
        except Interrupted:
            return "pruned" if watcher.pruned else "unfinished"
        except NotFinite as error:
            self.display.warn(error.what)
            return "diverged"
        finally:
            watcher.keep()
        watcher.kept |= {"loss": state.best_valid_loss, "step": state.best_step}
        return "complete"

    def _clean(self, name: str) -> None:
        """Remove the checkpoints of a trial: its settings are kept, and train makes the adapter again."""
        shutil.rmtree(self.folder / name / "checkpoints", ignore_errors=True)

    def _show(self, named: str, outcome: Outcome) -> None:
        loss = "no validation loss" if outcome.loss is None else f"validation loss {outcome.loss:.4f}"
        at = f" at step {outcome.step} of {outcome.steps}" if outcome.step else ""
        self.display.say(f"{named}: {outcome.how}, {loss}{at}, {outcome.seconds:.0f} s")


def _name(number: int, more: int = 0) -> str:
    """Of a trial's folder."""
    return f"trials/{number:03d}{f'-seed-{more}' if more else ''}"

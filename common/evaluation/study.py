"""The trials of a search, in an SQLite file that optuna keeps: what was drawn, and what each came to."""

import math
import sqlite3
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import PROGRAM, UserError, first_line
from common.evaluation.search_space import Settings, Space
from common.run_record import Run

_FILE = "trials.sqlite3"
_RANDOM_TRIALS = 8  # before what they came to counts
# A trial is pruned that is worse than the median of the others after the same tenth of its steps; none before the
# fourth trial is complete, and none in its first three tenths.
TENTHS, _UNPRUNED_TRIALS, _UNPRUNED_TENTHS = 10, 4, 3
_OUTCOME = "outcome"  # the key of a trial's
_REPEATED = "repeated"  # begins the key of a repetition's
_ORDER = 6  # the purpose of the random numbers


@dataclass(frozen=True)
class Outcome:
    """What a trial, or a repetition of it with another seed, came to."""

    number: int  # of the trial, from 1
    settings: Settings
    loss: float | None  # the best validation's
    step: int | None  # of that validation
    steps: int  # done
    seconds: float
    how: str  # it ended: complete, pruned, diverged, failed; or unfinished

    @property
    def value(self) -> float:
        """The loss by which trials are compared: of one that is not complete, infinite."""
        return math.inf if self.loss is None or self.how != "complete" else self.loss

    def beats(self, other: "Outcome", min_delta: float) -> bool:
        """Whether the loss is lower by more than `min_delta`, a share of the other's."""
        return self.value < other.value * (1 - min_delta)


def _outcome(number: int, settings: Settings, kept: dict[str, Any]) -> Outcome:
    figures = kept.get("loss"), kept.get("step"), kept.get("steps", 0), kept.get("seconds", 0.0)
    return Outcome(number, settings, *figures, kept.get("how", "unfinished"))


@dataclass(frozen=True)
class Trial:
    """A trial that is being done. reported: the tenths of its steps after which its loss is known."""

    number: int  # from 1
    settings: Settings
    kept: dict[str, Any]  # of its outcome, by an earlier process
    reported: int
    inner: Any  # optuna's

    def report(self, loss: float, tenth: int) -> bool:
        """Make the best loss until then known; whether the trial is to be pruned."""
        self.inner.report(loss, tenth)
        return bool(self.inner.should_prune())

    def keep(self, kept: dict[str, Any]) -> None:
        self.inner.set_user_attr(_OUTCOME, kept)


class Unkept(UserError):
    """The search's file cannot be written; its trial is not to blame, and stays unfinished."""


class Study:
    """The trials of one search, of all its processes."""

    def __init__(self, folder: Path, space: Space) -> None:
        """Raises UserError where the file is damaged, or cannot be written; every other method where it cannot be."""
        import optuna
        from sqlalchemy import event

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder.resolve() / _FILE
        # not by its URL, in which letters of a folder's name may mean something
        settings = {"creator": lambda: sqlite3.connect(path, check_same_thread=False)}
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{_FILE}", settings)
        except Exception as error:
            raise _fault(folder / _FILE, error) from None

        def replaced(found: Any) -> UserError | None:
            expected = isinstance(found.original_exception, sqlite3.IntegrityError)  # by optuna: a study that exists
            return None if expected else _fault(folder / _FILE, found.original_exception)

        event.listen(storage.engine, "handle_error", replaced)
        pruner = optuna.pruners.MedianPruner(_UNPRUNED_TRIALS, _UNPRUNED_TENTHS)
        self.space, self._seed = space, space.options.seed
        self._study: Any = optuna.create_study(storage=storage, pruner=pruner, study_name="tune", load_if_exists=True)
        for settings in (space.automatic, space.written):
            if settings:
                self._study.enqueue_trial(settings, skip_if_exists=True)

    def outcomes(self) -> list[Outcome]:
        """Of every trial that was begun, in their order; the first is the automatic recipe's."""
        return [
            _outcome(each.number + 1, each.params, each.user_attrs.get(_OUTCOME, {}))
            for each in self._trials()
            if not _waits(each)
        ]

    def ended(self) -> list[Outcome]:
        return [each for each in self.outcomes() if each.how != "unfinished"]

    def best(self) -> Outcome | None:
        """The complete trial with the lowest loss, the first of several."""
        complete = [each for each in self.outcomes() if each.how == "complete"]
        return min(complete, key=lambda each: each.value, default=None)

    def repetitions(self) -> dict[tuple[int, int], Outcome]:
        """The trials that were trained again, by number and what was added to the seed."""
        parts = ((key.split(), kept) for key, kept in self._study.user_attrs.items() if key.startswith(_REPEATED))
        return {(int(number), int(more)): _outcome(int(number), {}, kept) for (_, number, more), kept in parts}

    def keep_repetition(self, number: int, more: int, kept: dict[str, Any]) -> None:
        self._study.set_user_attr(f"{_REPEATED} {number} {more}", kept)

    def next(self) -> Trial:
        """The trial that was stopped or killed, else a new one."""
        import optuna

        open_trials = [each for each in self._trials() if each.state.name == "RUNNING"]
        if open_trials:
            found: Any = optuna.trial.Trial(self._study, open_trials[0]._trial_id)
            reported = max(open_trials[0].intermediate_values, default=0)
        else:
            seed = self._seed + len(self.outcomes())  # a search that was stopped draws what it would have drawn
            self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM_TRIALS, seed=seed)
            if self.space.rates is None and not any(map(_waits, self._trials())):
                untried = self.untried()
                drawn = np.random.default_rng([seed, _ORDER]).integers(len(untried))
                self._study.enqueue_trial(untried[int(drawn)])
            found, reported = self._study.ask(), 0
        if self.space.rates is not None:
            found.suggest_float("learning_rate", *self.space.rates, log=True)
        for name, values in self.space.choices.items():
            found.suggest_categorical(name, values)
        return Trial(found.number + 1, found.params, found.user_attrs.get(_OUTCOME, {}), reported, found)

    def untried(self) -> list[Settings]:
        """Where the learning rate is not searched, there are finitely many settings: those that no trial had."""
        tried = [trial.params for trial in self._trials() if trial.state.name != "RUNNING"]  # one that was stopped
        every = (dict(zip(self.space.choices, values, strict=True)) for values in product(*self.space.choices.values()))
        return [settings for settings in every if settings not in tried]

    def tell(self, trial: Trial, kept: dict[str, Any]) -> None:
        """End the trial. kept: its outcome."""
        from optuna.trial import TrialState

        trial.keep(kept)
        if kept["how"] == "complete":
            self._study.tell(trial.inner, kept["loss"])
        else:  # for the sampler one that diverged is as one that was pruned: worse than all complete ones
            failed = kept["how"] == "failed"
            self._study.tell(trial.inner, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def _trials(self) -> list[Any]:
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found


def _fault(path: Path, error: BaseException) -> UserError:
    """For an error of SQLite, for sqlalchemy's or optuna's error of one, or for that of a file that is not optuna's."""
    cause = error.__cause__ if hasattr(error.__cause__, "orig") else error
    cause = getattr(cause, "orig", cause)
    code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the primary one
    if code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        fix = "Give another --output folder, or remove this one to start again."
        return UserError(f"{path} cannot be read: {first_line(error)}", fix)
    first = "Free space on that disk" if code == sqlite3.SQLITE_FULL else "Look at that file and its disk"
    again = f"{PROGRAM} tune --resume {Run(path.parent)} and a --budget or --trials"
    return Unkept(f"{path} cannot be written: {cause}", f"{first}, then continue with: {again}")


def _waits(trial: Any) -> bool:
    return bool(trial.state.name == "WAITING")

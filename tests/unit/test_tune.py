"""`tune`: what its arguments mean, when a trial is better than another, and every error by its words."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.commands import tune as module
from common.commands.tune import seconds_of
from common.evaluation.search_report import judged
from common.evaluation.study import Outcome
from tests.searches import fault, without

pytest_plugins = ("tests.searches",)  # its fixtures


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_the_help_says_what_holds_for_tune() -> None:
    parser = argparse.ArgumentParser(prog="tune")
    module.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "[--budget TIME] [--trials N]" in text
    assert "runs/<model>-<data>-<backend>-tune" in text
    assert "--recipe" not in text


def outcome(number: int, loss: float, how: str = "complete") -> Outcome:
    return Outcome(number, {}, loss, 1, 1, 1.0, how)


def study(*found: Outcome, again: dict[tuple[int, int], float] | None = None) -> Any:
    complete = [each for each in found if each.how == "complete"]
    return SimpleNamespace(
        outcomes=lambda: [*found],
        best=lambda: min(complete, key=lambda each: each.value, default=None),
        repetitions=lambda: {key: outcome(key[0], loss) for key, loss in (again or {}).items()},
        space=SimpleNamespace(options=SimpleNamespace(min_delta=0.002)),
    )


@pytest.mark.parametrize(
    ("found", "again", "number", "said"),
    [
        ([outcome(1, 2.0), outcome(2, 2.1)], {}, 1, "no trial was better than the automatic recipe"),
        (
            [outcome(1, 2.0), outcome(2, 1.999)],
            {},
            1,
            "no trial beat the automatic recipe by more than noise: 1.9990 against 2.0000 of trial 2, less than 0.2% "
            "lower (--min-delta)",
        ),
        (
            [outcome(1, 2.0), outcome(2, 1.8)],
            {},
            2,
            "trial 2 is better than the automatic recipe, 1.8000 against 2.0000; neither was repeated with another "
            "seed, so this may be noise",
        ),
        ([outcome(1, 9.0, "diverged"), outcome(2, 1.8)], {}, 2, "trial 2 is the best; the automatic recipe diverged"),
        (
            [outcome(1, 2.0), outcome(2, 1.8)],
            {(1, 1): 2.02, (1, 2): 1.99, (2, 1): 1.85, (2, 2): 1.83},
            2,
            "trial 2 beat the automatic recipe by more than noise: with 2 other seeds 1.8400 against 2.0050 on "
            "average, and the losses of one recipe differ by up to 0.0500",
        ),
        (
            [outcome(1, 2.0), outcome(2, 1.8)],
            {(1, 1): 2.02, (1, 2): 1.90, (2, 1): 1.85, (2, 2): 1.87},
            1,
            "no trial beat the automatic recipe by more than noise: trial 2 has with 2 other seeds 1.8600 against "
            "1.9600 on average, and the losses of one recipe differ by up to 0.1200",
        ),
    ],
)
def test_better_than_noise(found: list[Outcome], again: dict[tuple[int, int], float], number: int, said: str) -> None:
    chosen, why = judged(study(*found, again=again))
    assert (chosen.number, why) == (number, said)


# --- errors


def test_the_extra_is_named_where_it_is_missing(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda name: name != "optuna")
    error = fault(words, "--trials", 2)
    assert error.what == "tune needs optuna, which is not installed."
    assert error.fix == 'pip install "twintune[tune]", or in a checkout: pip install -e ".[tune]"'


def test_limits_are_asked_for(words: list[str]) -> None:
    assert fault(words).what == "Neither --budget nor --trials is given."
    assert "'5x' is not a time such as 30m, 2h or 1h30m" in fault(words, "--budget", "5x").what
    assert "'0' is not a number of trials, from 1" in fault(words, "--trials", "0").what


def test_validation_rows_are_needed(words: list[str]) -> None:
    few = [*without(words, "--valid-share"), "--valid-share", "0.1"]
    error = fault(few, "--trials", 2)
    assert "rows.jsonl has 2 validation rows, by which trials cannot be compared: at least 10 are needed." in error.what
    assert "Raise --valid-share" in error.fix
    none = [*without(words, "--valid-share"), "--valid-share", "0"]
    assert "rows.jsonl has no validation row, by which trials" in fault(none, "--trials", 2).what
    assert not Path("found").exists()


def test_something_must_be_left_to_search(words: list[str]) -> None:
    fixed = ["--learning-rate", 0.1, "--steps", 3, "--batch-size", 2, "--rank", 2, "--dropout", 0]
    error = fault(words, "--trials", 2, *fixed)
    assert error.what == "Nothing is left to search."
    assert error.fix == "Leave out one of --learning-rate, --epochs, --batch-size, --rank, --dropout."

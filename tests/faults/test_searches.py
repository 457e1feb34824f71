"""Searches of `tune`, on a backend without a framework: complete, killed at any step, out of budget, pruned, failing.

Only here a killed search is compared with the uninterrupted one, trial by trial.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.commands.prepare import prepare
from common.errors import UserError
from common.evaluation import search as search_module
from common.option_sources import load_options
from common.training.trials import Trials
from tests.contexts import context
from tests.searches import QUICK, Backends, fault, losses, run, trials, without
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

pytest_plugins = ("tests.searches",)  # its fixtures


def test_a_search_finds_the_best_and_writes_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = Backends()
    assert run(words, "--trials", 6, create=made) == 0
    folder, out = Path("found"), capsys.readouterr().out
    done = trials(folder)
    assert len(done) == 6
    assert made.made == 1, "the model is loaded once"
    automatic = {"learning_rate": 0.002, "epochs": 8, "batch_size": 4, "rank": 16, "dropout": 0.0}
    assert done[0]["params"] == automatic
    assert len({json.dumps(each["params"]) for each in done}) == 6
    for each in done:
        assert 0.0005 <= each["params"]["learning_rate"] <= 0.008
        assert each["params"]["epochs"] in (4, 8, 16)
        assert each["params"]["batch_size"] in (2, 4, 8)
        assert each["params"]["rank"] in (8, 16, 32, 64)
        assert each["params"]["dropout"] in (0, 0.05, 0.1)
    assert (
        "searched: learning rate 0.0005 to 0.008, epochs 4, 8 or 16, batch size 2, 4 or 8, rank 8, 16, 32 or 64, "
        "dropout 0, 0.05 or 0.1\n" in out
    )
    assert "trial 1 (the automatic recipe) of 6: learning rate 0.002, epochs 8, batch size 4, rank 16, dropout 0" in out
    assert re.search(r"trial 2 of 6: .*; best so far \d\.\d{4}", out)
    assert re.search(r"│ +1 │.*│ auto", out)
    assert (folder / "trials.svg").read_text().startswith("<?xml")
    assert not list(folder.glob("trials/*/checkpoints"))
    assert len(list(folder.glob("trials/*/metrics.jsonl"))) >= 6


def test_the_best_recipe_trains_as_its_trial_did(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The largest rate is the best for this model, by far more than noise."""
    run(words, "--trials", 6, "--schedule", "linear")
    out = capsys.readouterr().out.replace("\n", " ")
    best = min(trials(Path("found")), key=lambda each: each["value"])
    assert best["params"]["learning_rate"] > 0.002
    assert "beat the automatic recipe by more than noise: with 2 other seeds" in out
    assert "with seed 1: is it better than the automatic recipe by more than noise?" in out
    options, _ = load_options({"config": "found/best.yaml"})
    assert options.schedule == "linear"
    assert options.output is None
    job = prepare(options.model_copy(update={"export": "none"}), None, context())
    for name in ("learning_rate", "batch_size", "rank", "dropout"):
        assert getattr(job.recipe, name) == best["params"][name]
    assert job.recipe.seed == 0
    assert job.recipe.steps == best["params"]["epochs"] * -(-12 // best["params"]["batch_size"])
    first = Path("found/best.yaml").read_text().splitlines()[0]
    assert first.startswith(
        f"# trial {trials(Path('found')).index(best) + 1} of 6, validation loss {best['value']:.4f}; "
    )


def test_what_is_given_on_the_command_line_is_fixed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(words, "--trials", 4, "--learning-rate", 0.003, "--rank", 2, "--epochs", 2)
    done = trials(Path("found"))
    assert [sorted(each["params"]) for each in done] == [["batch_size", "dropout"]] * 4
    assert len({json.dumps(each["params"]) for each in done}) == 4, "no settings twice"
    options, _ = load_options({"config": "found/best.yaml"})
    assert (options.learning_rate, options.rank, options.epochs) == (0.003, 2, 2)
    assert "searched: batch size 2, 4 or 8, dropout 0, 0.05 or 0.1\n" in capsys.readouterr().out


def test_the_last_of_few_settings_is_finished_after_a_stop(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 20)
    few = ("--learning-rate", 0.003, "--rank", 2, "--steps", 4, "--batch-size", 4)
    run(words, "--budget", "3m", *few)  # nine steps: the third trial is stopped
    assert [each["state"] for each in trials(Path("found"))] == ["COMPLETE", "COMPLETE", "RUNNING"]
    run(words, "--budget", "2h", *few)
    assert [each["state"] for each in trials(Path("found"))] == ["COMPLETE"] * 3


def test_a_search_of_few_settings_ends_when_each_was_tried(words: list[str]) -> None:
    run(words, "--budget", "1h", "--learning-rate", 0.003, "--rank", 2, "--steps", 4, "--batch-size", 4)
    tried = [each["params"]["dropout"] for each in trials(Path("found"))]
    assert (tried[0], sorted(tried)) == (0, [0, 0.05, 0.1])


def test_a_files_values_are_the_second_trial(words: list[str]) -> None:
    Path("mine.yaml").write_text("learning_rate: 0.05\nrank: 3\nalpha: 6\n")
    run(words, "--trials", 2, "--config", "mine.yaml")
    first, second = (each["params"] for each in trials(Path("found")))
    assert (first["learning_rate"], first["rank"]) == (0.002, 16)
    assert second == first | {"learning_rate": 0.05, "rank": 3}
    assert load_options({"config": "found/best.yaml"})[0].alpha == 6


def test_with_full_fine_tuning_there_is_no_adapter_to_search(words: list[str]) -> None:
    made = Backends(Full)
    run(words, "--trials", 2, "--method", "full", create=made)
    assert sorted(trials(Path("found"))[0]["params"]) == ["batch_size", "epochs", "learning_rate"]
    assert made.made >= 2, "its base has changed, and is loaded again"


class Full(Bigram):
    """Trains an adapter all the same; what it would have been given is not needed."""

    def load(self, recipe: Any, plan: Any, folder: Path, adapter: Any) -> Any:
        from common.models.lora_init import initial_adapter
        from tests.unit.bigram import LAYER

        return super().load(recipe, plan, folder, initial_adapter({LAYER: (64, 64)}, 1, recipe))


# --- stops and kills


class Killed(BaseException):
    """As kill -9: nothing after it runs that a killed process would not run."""


def killing(step: int) -> Callable[[], Bigram]:
    """Backends that together die at their step of that number."""
    taken = [0]

    class Dies(Bigram):
        def train_step(self, *given: Any) -> Any:
            taken[0] += 1
            if taken[0] == step:
                raise Killed
            return super().train_step(*given)

    return Dies


@pytest.mark.parametrize("step", [20, *(pytest.param(step, marks=pytest.mark.long) for step in (2, 55, 70))])
def test_a_killed_search_continues_as_if_it_had_not_been(words: list[str], step: int) -> None:
    run(words, "--trials", 5, *QUICK)
    complete = Path("found").rename("complete")
    with pytest.raises(Killed):
        run(words, "--trials", 5, *QUICK, create=killing(step))
    killed = trials(Path("found"))
    assert [each["state"] for each in killed].count("RUNNING") == (step < 60), "later the best trial is repeated"
    assert run(words, "--trials", 5, *QUICK) == 0
    assert trials(Path("found")) == trials(complete)
    for number in range(1, 6):
        assert losses(Path("found"), number) == losses(complete, number)
    assert Path("found/best.yaml").read_text() == (complete / "best.yaml").read_text()


def test_a_trial_is_continued_and_not_done_again(words: list[str]) -> None:
    with pytest.raises(Killed):
        run(words, "--trials", 1, *QUICK, create=killing(10))
    steps: list[int] = []

    class Counts(Bigram):
        def train_step(self, batches: Any, rate: float, step: int) -> Any:
            steps.append(step)
            return super().train_step(batches, rate, step)

    run(words, "--trials", 1, *QUICK, create=Counts)
    assert steps == [10, 11, 12], "from the checkpoint of the third epoch"


def test_resume_takes_the_folder_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(words, "--trials", 2, "--dropout", 0.05)
    before = trials(Path("found"))
    capsys.readouterr()
    assert run([], "--resume", "found", "--trials", 3) == 0
    assert trials(Path("found"))[:2] == before
    assert len(trials(Path("found"))) == 3
    assert "found holds this search: 2 trials are kept, and it continues" in capsys.readouterr().out
    assert "dropout" not in trials(Path("found"))[2]["params"]
    assert run([], "--resume", "found", "--trials", 3) == 0, "nothing is left to do"
    assert len(trials(Path("found"))) == 3


def test_ctrl_c_saves_shows_and_names_the_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os
    import signal

    taken = [0]

    class Interrupts(Bigram):
        def train_step(self, *given: Any) -> Any:
            taken[0] += 1
            if taken[0] == 20:
                os.kill(os.getpid(), signal.SIGINT)
            return super().train_step(*given)

    assert run(words, "--trials", 3, *QUICK, create=Interrupts) == 130
    out = capsys.readouterr().out.replace("\n", " ")
    assert re.search(
        r"stopped, saved. Continue with: \S+ cli.py tune --resume \S+found and a --budget or --trials", out
    )
    states = [each["state"] for each in trials(Path("found"))]
    assert states == ["COMPLETE", "RUNNING"]
    assert "unfinished" in out
    assert Path("found/best.yaml").exists()
    assert list(Path("found/trials/002/checkpoints").iterdir()), "its steps are not lost"
    assert run(words, "--trials", 3, *QUICK) == 0


# --- the budget


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Every step takes so long, by the clock that the budget is counted by; returned."""
    now = [0.0]
    monkeypatch.setattr(search_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    plain = Bigram.train_step

    def train_step(self: Bigram, *given: Any) -> Any:
        now[0] += seconds
        return plain(self, *given)

    monkeypatch.setattr(Bigram, "train_step", train_step)
    return now


def test_loading_takes_nothing_of_the_budget(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now, ready = slow(monkeypatch, 20), Trials._ready

    def loads(self: Trials, *given: Any) -> Any:
        now[0] += 600
        return ready(self, *given)

    monkeypatch.setattr(Trials, "_ready", loads)
    assert run(words, "--budget", "6m", *QUICK) == 0
    first, second = trials(Path("found"))
    assert (first["state"], second["steps"]) == ("COMPLETE", 7)


def test_the_budget_ends_a_trial_which_continues_with_more(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow(monkeypatch, 20)
    assert run(words, "--budget", "6m", *QUICK) == 0
    out = capsys.readouterr().out
    first, second = trials(Path("found"))
    assert (first["state"], second["state"]) == ("COMPLETE", "RUNNING")
    assert second["steps"] == 7
    assert "trial 1 (the automatic recipe): learning rate 0.002" in out
    assert "6.0 min left" in out
    assert re.search(r"trial 2: .*; 2.0 min left", out)
    run(words, "--budget", "6m", *QUICK)
    assert trials(Path("found"))[1]["steps"] == 7, "the budget is a total"
    run(words, "--budget", "30m", *QUICK)
    assert trials(Path("found"))[1]["state"] != "RUNNING"
    assert not list(Path("found").glob("trials/002/checkpoints"))


def test_a_budget_too_short_for_one_trial(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 10)
    error = fault(words, "--budget", "60s")
    assert error.what == "Not even one trial was complete within the limits."
    assert re.search(r"Continue with more: .* tune --resume .*found --budget 2h", error.fix)


def test_a_part_of_the_budget_is_kept_for_other_seeds(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow(monkeypatch, 2)
    run(words, "--budget", "6m", *QUICK)
    assert "with 2 other seeds" in capsys.readouterr().out


def test_the_time_of_a_killed_trial_counts(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 11)
    with pytest.raises(Killed):
        run(words, "--budget", "2m", *QUICK, create=killing(9))
    error = fault(words, "--budget", "80s", *QUICK)
    assert error.what == "Not even one trial was complete within the limits."


# --- pruning, and trials that go wrong


def test_a_poor_trial_is_pruned(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(words, "--trials", 12, "--patience", 0, *QUICK)
    done = trials(Path("found"))
    pruned = [each for each in done if each["state"] == "PRUNED"]
    assert pruned
    assert [each["state"] for each in done[:4]] == ["COMPLETE"] * 4
    for each in pruned:
        assert each["how"] == "pruned"
        assert each["steps"] < 12
        last = max(map(int, each["reported"]))
        others = sorted(
            t["reported"][last] for t in done[: done.index(each)] if t["state"] == "COMPLETE" and last in t["reported"]
        )
        assert each["reported"][last] > others[(len(others) - 1) // 2]
    assert "pruned" in capsys.readouterr().out


def test_a_trial_that_diverges_ends_alone(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    steps = [0]

    class Diverges(Bigram):
        def train_step(self, *given: Any) -> Any:
            steps[0] += 1
            self.nan_step = given[2] if steps[0] == 30 else None
            return super().train_step(*given)

    made = Backends(Diverges)
    assert run(words, "--trials", 3, create=made) == 0
    assert [each["how"] for each in trials(Path("found"))] == ["complete", "diverged", "complete"]
    assert made.made == 2, "the next trial begins with a model in order"
    assert "is not finite at step" in capsys.readouterr().out


def test_a_trial_that_fails_ends_alone_and_two_in_a_row_end_the_search(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    class Fails(Bigram):
        def train_step(self, *given: Any) -> Any:
            if len(self.calls) > 60:
                raise UserError("The device failed: it did.", "Look at it.")
            return super().train_step(*given)

    class FailsOnce(Bigram):
        def train_step(self, *given: Any) -> Any:
            steps.append(1)
            if len(steps) == 30:
                raise UserError("The device failed: it did.", "Look at it.")
            return super().train_step(*given)

    steps: list[int] = []
    assert run(words, "--trials", 3, create=FailsOnce) == 0
    assert [each["how"] for each in trials(Path("found"))] == ["complete", "failed", "complete"]
    assert "trial 2 failed: The device failed: it did." in capsys.readouterr().out
    shutil.rmtree("found")

    class Always(Bigram):
        def train_step(self, *given: Any) -> Any:
            raise UserError("The device failed: it did.", "Look at it.")

    assert fault(words, "--trials", 3, create=Always).what == "The device failed: it did."
    assert [each["state"] for each in trials(Path("found"))] == ["RUNNING"], "the automatic recipe is tried again"
    shutil.rmtree("found")
    run(words, "--trials", 1)
    for count in (2, 3):  # the second time, one more is tried
        assert run(words, "--trials", 9, create=Always) == 0
        found = ["complete", *["failed"] * count]
        assert [each["how"] for each in trials(Path("found"))] == found
        assert "the search ends: two trials in a row failed" in capsys.readouterr().out
    assert Path("found/best.yaml").exists()


# --- what is better than noise


# --- what another search, or another process, has left


def test_another_search_is_not_mixed_in(words: list[str]) -> None:
    run(words, "--trials", 1)
    error = fault(words, "--trials", 2, "--alpha", 8)
    assert "found holds another search: of other options, rows or another model." in error.what
    assert "tune --resume" in error.fix
    assert len(trials(Path("found"))) == 1
    Path("full").mkdir()
    Path("full/file").touch()
    other = [*without(words, "--output"), "--output", "full"]
    assert fault(other, "--trials", 1).what == "--output full is not an empty folder."


def test_without_output_the_same_command_finds_its_folder(words: list[str]) -> None:
    plain = without(words, "--output")
    run(plain, "--trials", 1)
    run(plain, "--trials", 2)
    run(plain, "--trials", 1, "--alpha", 8)
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "tiny-llama-rows-torch-tune",
        "tiny-llama-rows-torch-tune-2",
    ]
    assert len(trials(Path("runs/tiny-llama-rows-torch-tune"))) == 2


def test_what_resume_does_not_take(words: list[str]) -> None:
    assert fault([], "--resume", "nowhere", "--trials", 1).what == "--resume nowhere: no search is there."
    run(words, "--trials", 1)
    error = fault([], "--resume", "found", "--trials", 2, "--alpha", 4, "--output", "x")
    assert "it does not combine with --alpha, --output." in error.what
    Path("found/search.json").write_text("{}")
    assert fault([], "--resume", "found", "--trials", 2).what == "found/search.json is not what tune has written."
    Path("found/search.json").write_text("{")
    assert "found/search.json is not JSON" in fault([], "--resume", "found", "--trials", 2).what


def test_changed_rows_are_another_search(words: list[str]) -> None:
    run(words, "--trials", 1)
    write_rows(Path("rows.jsonl"), 26)
    error = fault([], "--resume", "found", "--trials", 2)
    assert error.what == "found holds another search: the model, the rows or the automatic recipe have changed."


def test_a_damaged_file_of_trials(words: list[str]) -> None:
    run(words, "--trials", 1)
    Path("found/trials.sqlite3").write_bytes(b"not a database" * 100)
    error = fault(words, "--trials", 2)
    assert "trials.sqlite3 cannot be read:" in error.what
    assert error.fix == "Give another --output folder, or remove this one to start again."


def test_two_at_once(words: list[str]) -> None:
    from common.run_lock import held

    run(words, "--trials", 1)
    with held(Path("found")):
        assert "by another process" in fault(words, "--trials", 2).what

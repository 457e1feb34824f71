"""A training that collapses goes back to its best adapter, at half the learning rate."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backend import StepResult
from common.commands import train as command
from common.commands.train import run_training
from common.documents import read_json_lines
from common.errors import UserError
from common.evaluation import alarms
from common.options import Options
from common.recipe import Parent, Recipe
from common.run_record import Run
from common.training import checkpoint, rollback
from common.training.faults import NotFinite
from common.training.loop import Interrupted
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

RATE = 0.008


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {
        **{"model": str(tiny_llama), "data": str(write_rows(tmp_path / "rows.jsonl")), "output": str(tmp_path / "run")},
        **{"backend": "torch", "device": "cpu", "precision": "fp32", "export": "none", "on_collapse": "rollback"},
        **{"rank": 2, "steps": 10, "eval_every": 2, "valid_share": 0.5, "learning_rate": RATE, "warmup": 0.0},
    }


class Collapses(Bigram):
    """Its validation loss jumps after step 4, while the recipe's learning rate is above `bearable`."""

    bearable = RATE / 3
    trained = 0
    opened: list["Collapses"]

    def __init__(self) -> None:
        super().__init__()
        self.opened.append(self)

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> StepResult:
        self.trained = step
        return super().train_step(micro_batches, learning_rate, step)

    def eval_step(self, batch: Any) -> StepResult:
        collapsed = self.trained > 4 and self.recipe.learning_rate > self.bearable
        loss = 9.0 if collapsed else 5.0 - 0.1 * self.trained
        return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)

    def generate(self, token_ids: np.ndarray, *args: Any, **more: Any) -> Iterator[int]:
        yield 5 + len(token_ids) % 40


def train(given: dict[str, Any], kind: type[Collapses] = Collapses) -> Path:
    kind.opened = []
    return run_training(Options.model_validate(given), context(create=kind))


def lines(folder: Path) -> list[int]:
    return [line["step"] for line in read_json_lines(folder / "metrics.jsonl", "") if "loss" in line]


def test_it_continues_from_the_best_adapter_until_it_holds(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    write = Run.write_recipe

    def watched(self: Run, recipe: Recipe) -> None:
        begun.append(recipe.hash())
        write(self, recipe)

    monkeypatch.setattr(Run, "write_recipe", watched)
    folder = train(given)
    run, said = Run(folder), capsys.readouterr().err.replace("\n", " ")
    first, second = run.record.rollbacks
    assert (first.to_step, first.learning_rate, [alarm.name for alarm in first.alarms]) == (4, RATE / 2, ["worse"])
    assert (second.to_step, second.learning_rate) == (4, RATE / 4)
    assert f"rolled back from step {first.from_step} to step 4, the best so far (validation loss 4.6000)" in said
    assert "the learning rate is now 0.004, half of what it was" in said
    record, recipe = run.record, run.recipe
    assert (record.status, record.steps, record.alarms) == ("complete", 10, [])
    assert (record.recipe_hash, recipe.learning_rate) == (recipe.hash(), RATE / 4)
    assert recipe.parent == Parent(recipe=begun[0], step=4)  # whose curve it has until then
    assert lines(folder) == [*range(1, 11)]
    assert [backend.closed for backend in Collapses.opened] == [True, True, True]


@pytest.mark.slow
def test_what_was_the_best_is_what_training_continues_from(given: dict[str, Any]) -> None:
    best: list[dict[str, np.ndarray]] = []
    continued: list[dict[str, np.ndarray]] = []

    class Watched(Collapses):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> StepResult:
            found = super().train_step(micro_batches, learning_rate, step)
            if step == 4:
                best.append({name: array.copy() for name, array in self.parameters.items()})
            return found

        def set_optimizer(self, state: Any) -> None:
            super().set_optimizer(state)
            continued.append({name: array.copy() for name, array in self.parameters.items()})
            assert state.step == 0
            assert not any(array.any() for array in [*state.exp_avg.values(), *state.exp_avg_sq.values()])

    train(given, Watched)
    assert (len(best), len(continued)) == (1, 2)
    for name, array in best[0].items():
        np.testing.assert_array_equal(array, continued[0][name])
        np.testing.assert_array_equal(array, continued[1][name])


@pytest.mark.slow
def test_after_three_it_stops_and_says_so(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Hopeless(Collapses):
        bearable = 0.0

    with pytest.raises(Interrupted):
        train(given, Hopeless)
    run = Run(Path(given["output"]))
    assert [back.learning_rate for back in run.record.rollbacks] == [RATE / 2, RATE / 4, RATE / 8]
    assert len(run.record.rollbacks) == rollback.MOST
    assert run.record.status == "interrupted"
    assert "not rolled back again, after 3 times: look at the rows" in capsys.readouterr().err.replace("\n", " ")


def test_a_loss_that_is_not_finite_is_rolled_back_to_the_start(given: dict[str, Any]) -> None:
    class Diverges(Collapses):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> StepResult:
            found = super().train_step(micro_batches, learning_rate, step)
            if step == 2 and self.recipe.learning_rate == RATE:
                return StepResult.of(micro_batches, float("nan"), 1.0, 0)
            return found

        def eval_step(self, batch: Any) -> StepResult:
            return StepResult.of([batch], (5 - 0.1 * self.trained) * batch.label_tokens, 0.0, 0)

    warned = Path(given["output"]).with_name("warned")
    with pytest.raises(NotFinite):
        train(given | {"output": str(warned), "on_collapse": "warn"}, Diverges)
    folder = train(given, Diverges)
    (back,) = Run(folder).record.rollbacks
    assert (back.from_step, back.to_step, back.alarms) == (1, 0, [])
    assert Run(folder).recipe.parent == Parent(recipe=Run(warned).record.recipe_hash, step=0)
    assert lines(folder) == [*range(1, 11)]


def test_what_a_lower_rate_does_not_help_stops(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Marked(Collapses):
        bearable = 1.0

        def generate(self, *args: Any, **more: Any) -> Any:
            yield from [61, 43, 48, 53, 54, 63]  # [INST]

    with pytest.raises(Interrupted):
        train(given, Marked)
    record = Run(Path(given["output"])).record
    assert ("markers" in {alarm.name for alarm in record.alarms}, record.rollbacks) == (True, [])
    assert "a lower learning rate does not help against this" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_kill_at_any_point_of_it_leaves_a_run_that_continues(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the record decides, the run continues as it was; afterwards, from the best adapter at half the rate."""
    real = Run.update

    def killed(self: Run, **fields: Any) -> None:
        if "rollbacks" in fields:
            raise KeyboardInterrupt
        real(self, **fields)

    monkeypatch.setattr(Run, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(given)
    monkeypatch.setattr(Run, "update", real)
    run = Run(Path(given["output"]))
    assert checkpoint.latest_step(run.path) == 4
    train({"resume": given["output"]})
    assert (run.record.status, run.record.steps) == ("complete", 10)

    given |= {"output": f"{given['output']}-2"}
    monkeypatch.setattr(Run, "write_recipe", _killed_at_rollback(Run.write_recipe))
    with pytest.raises(KeyboardInterrupt):
        train(given)
    monkeypatch.undo()
    train({"resume": given["output"]})
    run = Run(Path(given["output"]))
    assert (run.record.status, run.record.recipe_hash) == ("complete", run.recipe.hash())
    assert [back.learning_rate for back in run.record.rollbacks] == [RATE / 2, RATE / 4]


def _killed_at_rollback(write: Any) -> Any:
    def killed(self: Run, recipe: Any) -> None:
        if recipe.parent is not None:
            raise KeyboardInterrupt
        write(self, recipe)

    return killed


def test_a_kill_between_an_alarm_and_its_rollback_forgets_nothing(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "roll_back", killed)
    with pytest.raises(KeyboardInterrupt):
        train(given)
    monkeypatch.undo()
    record = Run(Path(given["output"])).record
    assert ([alarm.name for alarm in record.alarms], record.rollbacks) == (["worse"], [])
    folder = train({"resume": given["output"]})
    first, second = Run(folder).record.rollbacks
    assert [(back.to_step, back.learning_rate) for back in (first, second)] == [(4, RATE / 2), (4, RATE / 4)]
    assert Run(folder).record.status == "complete"


@pytest.mark.slow
def test_the_best_adapter_does_not_count_where_it_shows_the_sign_itself(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Repeats(Collapses):
        def eval_step(self, batch: Any) -> StepResult:
            loss = 4.8 if self.trained > 2 else 5.0 - self.trained / 2
            return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)

    monkeypatch.setattr(alarms, "repetition", lambda text: 1.0)
    with pytest.raises(Interrupted):
        train(given, Repeats)
    record = Run(Path(given["output"])).record
    assert [(back.to_step, back.alarms[0].name) for back in record.rollbacks] == [(0, "repetition")] * 3


def test_a_sign_in_answers_is_answered_at_the_resume_though_the_loss_still_fell(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "repetition", lambda text: 1.0)
    with pytest.raises(Interrupted):
        train(given | {"on_collapse": "stop"})
    record = Run(Path(given["output"])).record
    assert [(alarm.name, alarm.since, alarm.step) for alarm in record.alarms] == [("repetition", 2, 4)]
    monkeypatch.undo()
    folder = train({"resume": given["output"], "on_collapse": "rollback"})
    assert [back.to_step for back in Run(folder).record.rollbacks][:1] == [0]


def test_a_run_that_has_recovered_is_not_rolled_back(given: dict[str, Any]) -> None:
    class Recovers(Collapses):
        def eval_step(self, batch: Any) -> StepResult:
            loss = 9.0 if self.trained == 2 else 5.0 - 0.1 * self.trained
            return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)

    folder = train(given | {"on_collapse": "warn", "steps": 8}, Recovers)
    assert [(alarm.name, alarm.step) for alarm in Run(folder).record.alarms] == [("worse", 2)]
    train({"resume": str(folder), "steps": 10, "on_collapse": "rollback"}, Recovers)
    assert (Run(folder).record.rollbacks, lines(folder)) == ([], [*range(1, 11)])


def test_a_run_that_was_stopped_or_warned_can_go_back_to_its_best_adapter(given: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        train(given | {"on_collapse": "stop"})
    folder = train({"resume": given["output"], "on_collapse": "rollback"})
    assert [back.to_step for back in Run(folder).record.rollbacks] == [4, 4]
    assert (Run(folder).record.status, lines(folder)) == ("complete", [*range(1, 11)])


def test_without_validations_it_continues_from_the_checkpoint_before(given: dict[str, Any]) -> None:
    class Diverges(Collapses):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> StepResult:
            found = super().train_step(micro_batches, learning_rate, step)
            diverged = step == 8 and self.recipe.learning_rate == RATE
            return StepResult.of(micro_batches, float("nan"), 1.0, 0) if diverged else found

        def set_optimizer(self, state: Any) -> None:
            super().set_optimizer(state)
            assert any(array.any() for array in state.exp_avg.values())

    folder = train(given | {"valid_share": 0.0, "save_every": 3}, Diverges)
    (back,) = Run(folder).record.rollbacks
    assert (back.from_step, back.to_step) == (7, 6)
    assert lines(folder) == [*range(1, 11)]


@pytest.mark.slow
def test_a_lengthened_run_can_begin_again(given: dict[str, Any]) -> None:
    class NoBetter(Collapses):
        def eval_step(self, batch: Any) -> StepResult:
            collapsed = self.trained > 12 and self.recipe.learning_rate == RATE
            loss = 9.0 if collapsed else 5.0 + 0.1 * (self.trained > 0)
            return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)

    folder = train(given | {"warmup": 0.2, "patience": 0}, NoBetter)
    train({"resume": str(folder), "steps": 20}, NoBetter)
    assert [back.to_step for back in Run(folder).record.rollbacks] == [0]
    assert (Run(folder).record.status, lines(folder)) == ("complete", [*range(1, 21)])
    assert Run(folder).recipe.warmup_steps == 2  # as it began


def test_a_stop_during_a_rollback_is_a_stop(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> str:
        said = rollback.roll_back(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        return said

    monkeypatch.setattr(command, "roll_back", stopped)
    with pytest.raises(Interrupted) as caught:
        train(given)
    assert not isinstance(caught.value, rollback.RolledBack)
    monkeypatch.undo()
    train({"resume": given["output"]})
    assert len(Run(Path(given["output"])).record.rollbacks) == 2


class CollapsesLast(Collapses):
    def eval_step(self, batch: Any) -> StepResult:
        loss = 9.0 if self.trained == 10 else 5.0 - 0.1 * self.trained
        return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)


class CollapsesSlowly(Collapses):
    def eval_step(self, batch: Any) -> StepResult:
        loss = {2: 4.0, 4: 4.1, 6: 9.0}.get(self.trained, 5.0)
        return StepResult.of([batch], loss * batch.label_tokens, 0.0, 0)


@pytest.mark.parametrize(
    ("kind", "more", "best"), [(CollapsesLast, {}, 8), (CollapsesSlowly, {"patience": 2}, 2)], ids=["steps", "patience"]
)
def test_a_training_that_was_over_does_not_begin_again(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: type[Collapses], more: dict[str, Any], best: int
) -> None:
    """Its last validation raised an alarm, and it was killed before the adapter was written."""

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train(given | more, kind)
    monkeypatch.undo()
    folder = train({"resume": given["output"]}, kind)
    record = Run(folder).record
    assert ([alarm.name for alarm in record.alarms], record.rollbacks) == (["worse"], [])
    assert (record.status, record.exported_step) == ("complete", best)


def test_damaged_answers_of_a_run_cost_no_resume(given: dict[str, Any]) -> None:
    class Good(Collapses):
        bearable = 1.0

    folder = train(given, Good)
    with (folder / "samples.jsonl").open("a") as file:
        for line in ({"answer": None}, {"answer": "a", "reference": 3, "ended": True}, {"drift": "far"}):
            file.write(json.dumps({"step": 4} | line) + "\n")
    train({"resume": str(folder), "steps": 12}, Good)
    assert Run(folder).record.steps == 12


def test_what_was_given_with_the_command_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []

    def once(options: Options, *_: Any) -> Path:
        seen.append(options)
        if len(seen) == 1:
            raise rollback.RolledBack(Run(tmp_path), 3)
        return tmp_path

    monkeypatch.setattr(command, "_run_training", once)
    words = {"llama_cpp": "mine", "no_text": True, "export": "fused"}
    run_training(Options.model_validate(words | {"resume": "runs/a", "steps": 9}), context())
    assert seen[1].model_dump(exclude_unset=True) == words | {"resume": str(tmp_path)}


def test_no_text_of_an_answer_is_kept(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    class Same(Collapses):
        bearable = 1.0

        def generate(self, *args: Any, **more: Any) -> Any:
            yield 40

    for name, more in (("kept", {}), ("not", {"no_text": True})):
        folder = train(given | more | {"output": f"{given['output']}-{name}", "on_collapse": "warn"}, Same)
        quotes = {alarm.quote for alarm in Run(folder).record.alarms if alarm.name == "same"}
        said = capsys.readouterr().err
        assert "every prompt has the same answer at step 4" in said.replace("\n", " ")
        assert (quotes == {""}) == (name == "not")


@pytest.mark.slow
def test_a_run_that_was_rolled_back_can_be_lengthened(given: dict[str, Any]) -> None:
    folder = train(given)
    train({"resume": str(folder), "steps": 14})
    assert (Run(folder).record.steps, Run(folder).recipe.learning_rate) == (14, RATE / 4)
    with pytest.raises(UserError, match="has trained 14 steps already"):
        train({"resume": str(folder), "steps": 14})

"""A run that goes on to another number of steps: its new recipe, its learning rate, and what is refused."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backend import OutOfMemory
from common.commands import train as module
from common.commands.train import run_training
from common.errors import UserError
from common.export.model_card import parts_of
from common.export.upload import files_of
from common.inference.chat_models import choose
from common.models.adapter_files import read_peft
from common.option_sources import load_options
from common.options import Options
from common.recipe import Parent, Recipe
from common.run_fields import GgufRecord
from common.run_record import Run
from common.training.loop import Interrupted
from common.training.schedule import learning_rate
from common.verify_record import VerifyRecord
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run of 6 steps, three an epoch."""
    monkeypatch.chdir(tmp_path)
    return {
        "model": str(tiny_llama),
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "output": str(tmp_path / "run"),
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "batch_size": 8,
        "epochs": 2,
        "save_every": 100,
        "learning_rate": 0.01,
    }


def run(given: dict[str, Any], backend: Bigram | None = None) -> Run:
    backend = backend or Bigram()
    return Run(run_training(Options.model_validate(given), context("plain", create=lambda: backend)))


def longer(run_: Run, backend: Bigram | None = None, **length: float) -> Run:
    return run({"resume": str(run_.path)} | length, backend)


def metrics(run: Run) -> list[dict]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def rates(run: Run) -> list[float]:
    return [line["learning_rate"] for line in metrics(run) if "learning_rate" in line]


def contents(run: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def fault(run_: Run, **length: float) -> UserError:
    """The error of a change of length, which leaves the run as it was."""
    before = contents(run_)
    with pytest.raises(UserError) as caught:
        longer(run_, **length)
    assert contents(run_) == before
    return caught.value


class Stops(Bigram):
    """Ctrl-C comes while this step is computed."""

    at = 3

    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().train_step(micro_batches, learning_rate, step)


class StopsLater(Stops):
    at = 9


def stopped(given: dict[str, Any], backend: Bigram) -> Run:
    with pytest.raises(Interrupted):
        run(given, backend)
    return Run(Path(given["output"] if "output" in given else given["resume"]))


def test_a_finished_run_goes_on_and_keeps_what_it_has(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(given)
    before, record, old = metrics(done), done.record, done.recipe
    adapter = read_peft(done.adapter)
    capsys.readouterr()
    longer(done, epochs=4)
    after = metrics(done)
    assert after[: len(before)] == before
    assert [line["step"] for line in after if "loss" in line] == [*range(1, 13)]
    new = done.recipe
    assert new == old.model_copy(update={"steps": 12, "parent": Parent(recipe=record.recipe_hash, step=6)})
    assert rates(done)[6:] == [learning_rate(new, step) for step in range(7, 13)]
    assert done.record.recipe_hash == new.hash() != old.hash()
    assert (done.record.status, done.record.steps, done.record.parent) == ("complete", 12, new.parent)
    assert (done.record.options["epochs"], done.record.options["steps"]) == (4, None)
    again = read_peft(done.adapter)
    assert any(not np.array_equal(again.weights[n].B, weight.B) for n, weight in adapter.weights.items())
    said = " ".join(capsys.readouterr().out.split())
    assert "goes to 12 steps instead of 6. The learning rate now follows the schedule of 12 steps" in said
    assert f"{learning_rate(new, 7):.2g} at step 7, after {learning_rate(old, 6):.2g} at step 6." in said
    assert f"it continues {record.recipe_hash[:12]} from step 6" in said


def test_moments_and_the_best_adapter_go_on(given: dict[str, Any]) -> None:
    """A constant schedule has no end: two halves are then the same training as one."""
    given |= {"schedule": "constant", "warmup": 0}
    whole = run(given | {"epochs": 4})
    halves = run(given | {"output": f"{given['output']}-2"})
    longer(halves, epochs=4)
    assert metrics(halves) == metrics(whole)
    assert (halves.adapter / "adapter_model.safetensors").read_bytes() == (
        whole.adapter / "adapter_model.safetensors"
    ).read_bytes()
    assert halves.record.best_step == whole.record.best_step


@pytest.mark.slow
def test_there_is_no_second_warm_up(given: dict[str, Any]) -> None:
    """A warm-up of half the steps: it stays of three, through two changes of length and a stop."""
    done = run(given | {"schedule": "constant", "warmup": 0.5})
    stopped({"resume": str(done.path), "steps": 20}, StopsLater())
    run({"resume": str(done.path)})
    longer(done, steps=24)
    assert done.recipe.warmup_steps == 3
    assert rates(done)[2:] == [0.01] * 22


def test_a_stop_in_the_middle_changes_nothing(given: dict[str, Any]) -> None:
    complete = run(given)
    cut = Run(complete.path.with_name("cut"))
    shutil.copytree(complete.path, cut.path)
    longer(complete, steps=12)
    stopped({"resume": str(cut), "steps": 12}, StopsLater())
    assert cut.record.status == "interrupted"
    run({"resume": str(cut)})
    assert metrics(cut) == metrics(complete)
    assert cut.record.recipe_hash == complete.record.recipe_hash


def test_an_unfinished_run_is_lengthened_from_where_it_stands(given: dict[str, Any]) -> None:
    cut = stopped(given, Stops())
    first = cut.record.recipe_hash
    longer(cut, steps=10)
    assert cut.recipe.parent == Parent(recipe=first, step=3)
    assert rates(cut)[3:] == [learning_rate(cut.recipe, step) for step in range(4, 11)]


def test_an_unfinished_run_may_be_shortened(given: dict[str, Any]) -> None:
    cut = stopped(given, Stops())
    longer(cut, steps=4)
    assert (cut.record.status, cut.record.steps) == ("complete", 4)


def test_before_the_first_checkpoint_the_run_simply_gets_another_length(given: dict[str, Any]) -> None:
    class Dies(Bigram):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(given, Dies())
    begun = Run(Path(given["output"]))
    longer(begun, steps=4)
    plain = run(given | {"output": f"{begun}-2", "epochs": None, "steps": 4})
    assert begun.recipe.parent is None
    assert begun.record.recipe_hash == plain.record.recipe_hash
    assert metrics(begun) == metrics(plain)


def test_a_lengthened_run_is_lengthened_again(given: dict[str, Any]) -> None:
    done = run(given)
    longer(done, steps=8)
    second = done.record.recipe_hash
    longer(done, steps=10)
    assert done.recipe.parent == Parent(recipe=second, step=8)


def test_a_length_by_which_nothing_was_trained_leaves_no_trace(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(given)
    first = done.record.recipe_hash
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            longer(done, steps=100)
    assert done.record.recipe_hash != first
    longer(done, steps=8)
    assert done.recipe.parent == Parent(recipe=first, step=6)
    assert done.record.steps == 8


@pytest.mark.slow
def test_a_kill_between_the_two_files_is_made_good(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(run: Run, recipe: Recipe) -> None:
        raise KeyboardInterrupt

    done = run(given)
    complete = Run(done.path.with_name("complete"))
    shutil.copytree(done.path, complete.path)
    longer(complete, steps=12)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_recipe", killed)
        with pytest.raises(KeyboardInterrupt):
            longer(done, steps=12)
    assert done.recipe.hash() != done.record.recipe_hash
    run({"resume": str(done.path)})
    assert done.recipe.hash() == done.record.recipe_hash == complete.record.recipe_hash
    assert metrics(done) == metrics(complete)


def verified(run_: Run) -> dict[str, Any]:
    """Put a GGUF and a verdict on record, and return what then is there of the export."""
    run_.gguf.mkdir()
    (run_.gguf / "model-Q8_0.gguf").write_bytes(b"GGUF")
    run_.update_export(gguf=[GgufRecord(file="gguf/model-Q8_0.gguf", name="Q8_0")])
    run_.update(verify=VerifyRecord(verdict="sound"))
    return run_.record.model_dump(include={"export", "verify"})


def test_what_was_exported_before_is_no_longer_the_runs(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the process ends before there is a new export."""
    done = run(given | {"export": "fused"})
    verified(done)
    assert parts_of(done) == ["fused", "adapter", "gguf"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "export_run", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            longer(done, epochs=3, export="none")
    record = done.record
    assert (record.status, record.verify, record.export.fused, record.export.gguf) == ("complete", None, None, [])
    assert parts_of(done) == ["adapter"]
    targets = {file.target.removeprefix("adapter/") for file in files_of(done, [])}
    assert targets == {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    with pytest.raises(UserError, match="has no fused folder"):
        choose(done.path, "fused", None)


def test_a_finished_run_that_trains_no_further_keeps_its_export(given: dict[str, Any]) -> None:
    done = run(given | {"export": "fused"})
    before = verified(done)
    run({"resume": str(done.path), "export": "none"})
    after = done.record.model_dump(include={"export", "verify"})
    assert (after["export"]["gguf"], after["verify"]) == (before["export"]["gguf"], before["verify"])


def test_the_loss_of_test_rows_is_of_the_adapter_that_is_exported(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(given["output"]).with_name("data")
    folder.mkdir()
    for name in ("train", "valid", "test"):
        write_rows(folder / f"{name}.jsonl")
    done = run(given | {"data": str(folder)})
    assert done.record.test_rows

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_test", killed)
        with pytest.raises(KeyboardInterrupt):
            longer(done, epochs=3)
    record = done.record
    assert (record.status, record.test_loss, record.test_loss_interval) == ("complete", None, [])
    assert f"To export it: python cli.py train --resume {done}" in " ".join(capsys.readouterr().out.split())
    run({"resume": str(done.path)})
    assert done.record.test_loss is not None


def test_what_turned_out_to_fit_is_kept_with_another_interval(given: dict[str, Any]) -> None:
    class Short(Stops):
        def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
            if step == 2 and len(micro_batches) == 1:
                raise OutOfMemory("no")
            return super().train_step(micro_batches, learning_rate, step)

    cut = stopped(given, Short())
    (file,) = (cut.path / "checkpoints").glob("step-*/state.json")
    fitted = json.loads(file.read_text())["micro_batch_tokens"]
    assert fitted < cut.plan.micro_batch_tokens
    again = Stops()
    again.at = 5
    stopped({"resume": str(cut), "save_every": 50}, again)
    (file, *_) = sorted((cut.path / "checkpoints").glob("step-*/state.json"), reverse=True)
    assert json.loads(file.read_text())["micro_batch_tokens"] == fitted
    assert cut.plan.save_every == 50


def test_a_run_that_begins_again_after_a_rollback_can_be_lengthened(given: dict[str, Any]) -> None:
    class Dies(Bigram):
        def train_step(self, *args: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run(given, Dies())
    cut = Run(Path(given["output"]))
    parent = Parent(recipe=cut.record.recipe_hash, step=0)
    recipe = cut.recipe.model_copy(update={"parent": parent, "learning_rate": 0.005})
    options = cut.record.options | {"learning_rate": 0.005}
    cut.update(recipe_hash=recipe.hash(), parent=parent, options=options)
    cut.write_recipe(recipe)
    done = longer(cut, steps=8)
    assert (done.record.status, done.record.steps, done.recipe.parent) == ("complete", 8, parent)


# --- what is refused


@pytest.mark.parametrize(
    ("length", "said"),
    [
        ({"epochs": 1}, "--epochs 1: {run} has trained 6 steps already (2 epochs)."),
        ({"epochs": 2}, "--epochs 2: {run} has trained 6 steps already (2 epochs)."),
        ({"steps": 5}, "--steps 5: {run} has trained 6 steps already (2 epochs)."),
    ],
)
@pytest.mark.slow
def test_no_more_than_is_done_already(given: dict[str, Any], length: dict[str, float], said: str) -> None:
    done = run(given)
    error = fault(done, **length)
    assert (error.what, error.fix) == (said.format(run=done), "Give the total that it is to reach.")


def test_the_length_that_the_run_has_anyway(given: dict[str, Any]) -> None:
    cut = stopped(given, Stops())
    error = fault(cut, epochs=2)
    assert error.what == f"--epochs 2: {cut} goes to 6 steps already."
    assert error.fix == "Leave it out to finish the run; or give more."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"epochs": "many"}}, "the run's epochs: Input should be a valid number"),
        ({"options": {}, "data": {}}, "No model is given."),
    ],
)
def test_a_strangers_record_is_read_with_care(given: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    done = run(given)
    record = json.loads(done.record_file.read_text())
    changes["options"] = record["options"] | changes["options"] if changes["options"] else {}
    done.record_file.write_text(json.dumps(record | changes))
    assert said in fault(done, steps=9).what


def test_rows_that_have_changed_since(given: dict[str, Any]) -> None:
    done = run(given)
    rows = Path(given["data"])
    rows.write_text(rows.read_text().replace("number", "no.", 1))
    assert "its recipe has changed since it began (changed: data_hash" in fault(done, epochs=4).what


def test_a_run_whose_checkpoints_are_gone(given: dict[str, Any]) -> None:
    done = run(given)
    shutil.rmtree(done.checkpoints)
    for length in ({"epochs": 4}, {}, {"finish": True}):
        error = fault(done, **length)
        assert error.what == f"{done} has no checkpoint to continue from."
        assert error.fix == (
            f"What it has trained is kept. To export it: python cli.py fuse {done}. "
            f"To train it further, start a new run with --adapter {done}"
        )
    assert done.record.status == "complete"


@pytest.mark.parametrize("length", [{}, {"steps": 9}])
def test_a_stopped_run_whose_checkpoints_are_gone(given: dict[str, Any], length: dict[str, float]) -> None:
    cut = stopped(given, Stops())
    shutil.rmtree(cut.checkpoints)
    error = fault(cut, **length)
    assert error.what == f"{cut} has no checkpoint to continue from."
    assert error.fix == "Restore its checkpoints/, or start a new run."


def test_a_run_that_never_had_a_checkpoint_starts_again(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Fails(Bigram):
        def train_step(self, *args: Any) -> Any:
            if args[2] == 3:
                raise UserError("The device failed.", "Look at it.")
            return super().train_step(*args)

    with pytest.raises(UserError, match="The device failed"):
        run(given, Fails())
    begun = Run(Path(given["output"]))
    assert (begun.record.steps, begun.record.saved_recipe) == (2, "")
    longer(begun)
    assert f"{begun} has no checkpoint: training starts again at step 1" in " ".join(capsys.readouterr().out.split())
    assert [line["step"] for line in metrics(begun) if "loss" in line] == [*range(1, 7)]


def test_a_lengthened_run_whose_checkpoints_are_gone_does_not_begin_again(given: dict[str, Any]) -> None:
    done = run(given)
    cut = stopped({"resume": str(done.path), "steps": 12}, StopsLater())
    shutil.rmtree(cut.checkpoints)
    with pytest.raises(UserError, match="has no checkpoint to continue from"):
        run({"resume": str(cut.path)})


@pytest.mark.slow
def test_only_the_checkpoint_of_the_parents_own_step_is_continued(given: dict[str, Any]) -> None:
    done = run(given)
    cut = stopped({"resume": str(done.path), "steps": 12}, StopsLater())
    old = Run(cut.path.with_name("old"))
    shutil.rmtree(cut.checkpoints)
    cut.checkpoints.mkdir()
    earlier = stopped(given | {"output": str(old.path)}, Stops())
    shutil.copytree(earlier.checkpoints / "step-000003", cut.checkpoints / "step-000003")
    with pytest.raises(UserError, match="was made by another recipe"):
        run({"resume": str(cut.path)})


# --- ended where it stands


class StopsInFour(Bigram):
    """Stops in step 4, after a validation of step 3 that is the best, by Ctrl-C."""

    def train_step(self, *args: Any) -> Any:
        found = super().train_step(*args)
        if args[2] == 4:
            signal.raise_signal(signal.SIGINT)
        return found


def test_a_run_is_finished_where_it_stands(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Interrupted):
        run(given | {"eval_every": 3, "valid_share": 0.2}, StopsInFour())
    stopped = Run(Path(given["output"]))
    found = longer(stopped, finish=True)
    assert f"--finish: training ends at step 4 of {found.recipe.steps}" in capsys.readouterr().out
    record = found.record
    assert (record.status, record.steps, record.exported_adapter) == ("complete", 4, "best")
    assert [line["step"] for line in metrics(found) if "valid_loss" in line] == [0, 3, 4]
    assert read_peft(found.adapter).weights
    assert longer(found, steps=9).record.steps == 9


def test_a_run_without_validation_is_finished_with_its_last_adapter(given: dict[str, Any]) -> None:
    with pytest.raises(Interrupted):
        run(given | {"valid_share": 0.0}, StopsInFour())
    record = longer(Run(Path(given["output"])), finish=True).record
    assert (record.status, record.steps, record.exported_adapter) == ("complete", 4, "last")


def test_what_cannot_be_finished(given: dict[str, Any]) -> None:
    class Fails(Bigram):
        def train_step(self, *args: Any) -> Any:
            raise UserError("The device failed.", "Look at it.")

    with pytest.raises(UserError, match="The device failed"):
        run(given, Fails())
    with pytest.raises(UserError, match=r"--finish: .* has no checkpoint"):
        longer(Run(Path(given["output"])), finish=True)
    with pytest.raises(UserError, match="--finish and a length cannot be combined"):
        longer(Run(Path(given["output"])), finish=True, steps=9)
    for flags in ({"finish": True}, {"config": "a.yaml"}):
        Path("a.yaml").write_text("finish: true\n")
        with pytest.raises(UserError, match=r"--resume RUN|by --finish, not in a file"):
            load_options(flags)


def test_a_run_that_was_finished_stays_so_until_it_is_lengthened(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = stopped(given, Stops())
    with monkeypatch.context() as patch:
        patch.setattr(module, "export_run", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            longer(cut, finish=True)
    assert (cut.record.status, cut.record.finished_step) == ("complete", 3)
    assert longer(cut).record.steps == 3
    assert cut.record.status == "complete"
    capsys.readouterr()
    done = longer(cut, steps=6)  # as many as it would have had
    assert "goes to 6 steps instead of 3" in " ".join(capsys.readouterr().out.split())
    assert (done.record.steps, done.record.finished_step, done.recipe.parent.step) == (6, None, 3)  # type: ignore[union-attr]
    assert longer(done).record.steps == 6


def test_a_finish_that_was_killed_is_forgotten(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = stopped(given, Stops())
    with monkeypatch.context() as patch:
        patch.setattr(module, "_train", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            longer(cut, finish=True)
    assert longer(cut).record.steps == 6

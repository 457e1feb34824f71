"""What a resume takes from a run's record: nothing that sends a model elsewhere, and files where they are now."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.commands import train as module
from common.commands.fuse import fuse_run
from common.commands.train import run_training
from common.display import Display
from common.errors import UserError
from common.models.load import base_of
from common.option_sources import FLAGS_ONLY
from common.options import Options
from common.run_record import Run
from common.training.resume import options_to_resume, resumed_options
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram
from tests.unit.test_resume import Stops

PUBLISHES = {"push": "me/model", "push_public": True, "track": ["wandb"], "track_text": True}
PUBLISHES |= {"track_artifacts": ["adapter"], "with": ["10.0.0.1:7000"], "finish": True}


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of six steps, of a model and rows that can be moved."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model")
    return {
        "model": "model",
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "output": "run",
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "steps": 6,
    }


class StopsAtFive(Stops):
    at = 5


def train(given: dict[str, Any], backend: Bigram | None = None) -> Run:
    made = backend or Bigram()
    return Run(run_training(Options.model_validate(given), context("plain", create=lambda: made)))


def stopped(given: dict[str, Any]) -> Run:
    with pytest.raises(module.Interrupted):
        train(given, Stops())
    return Run(Path("run"))


def record_options(run: Run, **changes: Any) -> None:
    record = json.loads(run.record_file.read_text())
    record["options"] |= changes
    run.record_file.write_text(json.dumps(record))


def fault(given: dict[str, Any]) -> UserError:
    before = Path("run/run.json").read_text()
    with pytest.raises(UserError) as caught:
        train(given)
    assert Path("run/run.json").read_text() == before
    return caught.value


def test_no_record_makes_a_resume_publish(given: dict[str, Any]) -> None:
    run = stopped(given)
    record_options(run, **PUBLISHES)
    assert FLAGS_ONLY.keys() <= PUBLISHES.keys()
    options = resumed_options(Options(resume="run"), run).model_dump(by_alias=True)
    nothing = {"push": None, "push_public": False, "track_text": False, "track_artifacts": [], "with": []}
    assert {name: options[name] for name in PUBLISHES} == nothing | {"track": ["wandb"], "finish": False}
    again = resumed_options(Options(resume="run", push="me/other", push_public=True), run)
    assert (again.push, again.push_public) == ("me/other", True)


def test_what_is_not_taken_is_named(given: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped(given)
    record_options(run, push="me/my model", push_public=True)
    capsys.readouterr()
    with pytest.raises(module.Interrupted):
        train({"resume": "run"}, StopsAtFive())
    said = " ".join(capsys.readouterr().out.split())
    assert "The run was begun with --push-public --push 'me/my model'. What sends" in said


def test_a_stop_names_what_must_be_given_again(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.commands.prepare.check_push", lambda *args: None)
    flags = given | {"push": "me/model", "push_public": True, "on_collapse": "stop"}
    args = argparse.Namespace(flags=flags, command="train", allowed=None)
    assert module.run(args, context("plain", create=Stops)) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "Continue with: python cli.py train --resume run --push-public --push me/model" in said


def test_a_model_and_rows_that_have_moved(given: dict[str, Any]) -> None:
    run = stopped(given)
    Path("elsewhere").mkdir()
    shutil.move("model", "elsewhere/base")
    error = fault({"resume": "run"})
    assert error.what == f"run was begun with --model {Path('model').resolve()}, which is not there."
    assert error.fix == "Restore it, or say where it is now: --model PATH."
    shutil.move("rows.jsonl", "elsewhere/mine.jsonl")
    assert "--data" in fault({"resume": "run", "model": "elsewhere/base"}).what
    done = train({"resume": "run", "model": "elsewhere/base", "data": "elsewhere/mine.jsonl"})
    assert (done.record.status, done.record.recipe_hash) == ("complete", run.recipe.hash())
    assert done.record.options["model"] == str(Path("elsewhere/base").resolve())
    assert done.record.options["data"] == [str(Path("elsewhere/mine.jsonl").resolve())]
    assert train({"resume": "run", "steps": 8}).record.steps == 8


def test_another_model_or_other_rows_are_refused(given: dict[str, Any]) -> None:
    stopped(given)
    rows = Path("rows.jsonl").read_text()
    Path("other.jsonl").write_text(rows.replace("number", "no."))
    error = fault({"resume": "run", "data": "other.jsonl"})
    assert "its recipe has changed since it began (changed: data_hash" in error.what
    assert error.fix.startswith("Restore the old files, or start a new run.")
    shutil.copytree("model", "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "(changed: model_hash" in fault({"resume": "run", "model": "other"}).what


def test_an_adapter_and_a_template_that_have_moved(given: dict[str, Any]) -> None:
    """The template is the model's own, as a file."""
    train(given | {"output": "first"})
    shutil.copytree("first/adapter", "start")
    shutil.copy("model/chat_template.jinja", "chat.jinja")
    del given["rank"]
    stopped(given | {"adapter": "start", "chat_template": "chat.jinja"})
    shutil.move("start", "begin")
    shutil.move("chat.jinja", "own.jinja")
    assert "--adapter" in fault({"resume": "run", "chat_template": "own.jinja"}).what
    done = train({"resume": "run", "adapter": "begin", "chat_template": "own.jinja"})
    assert (done.record.status, done.record.steps) == ("complete", 6)
    assert Path(done.record.options["chat_template"]).name == "own.jinja"


def test_fuse_with_a_model_that_has_moved(given: dict[str, Any]) -> None:
    run = train(given)
    shutil.move("model", "base")
    with pytest.raises(UserError) as caught:
        fuse_run(run.path, {"export": "fused"}, context(create=Bigram))
    assert caught.value.fix == "Restore it, or say where it is now: --model PATH."
    shutil.copytree("base", "other")
    config = json.loads(Path("other/config.json").read_text())
    Path("other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="--model other is not the model that run was trained on"):
        fuse_run(run.path, {"export": "fused", "model": "other"}, context(create=Bigram))
    assert run.record.options["model"] == str(Path("model").resolve())
    fuse_run(run.path, {"export": "fused", "model": "base"}, context(create=Bigram))
    assert (run.fused / "config.json").exists()
    fuse_run(run.path, {"export": "fused"}, context(create=Bigram))
    assert run.record.hub_model == ""


def test_other_commands_say_how_a_model_that_has_moved_is_found(given: dict[str, Any]) -> None:
    run = train(given)
    was = Path("model").resolve()
    shutil.move("model", "base")
    with pytest.raises(UserError) as caught:
        base_of(run, Display("quiet"))
    assert caught.value.what == f"run was trained on {was}, which is not there."
    assert caught.value.fix.startswith("Restore it, or put a link there")
    assert caught.value.fix.endswith("python cli.py fuse run --model PATH")


def test_a_model_that_has_moved_keeps_its_name_on_the_hub(given: dict[str, Any]) -> None:
    run = train(given)
    run.update(options=run.record.options | {"model": "me/base"})
    fuse_run(run.path, {"export": "fused", "model": "model"}, context(create=Bigram))
    assert (run.record.hub_model, run.record.options["model"]) == ("me/base", str(Path("model").resolve()))
    assert "base_model: me/base" in (run.fused / "README.md").read_text()


def test_a_torchrun_restart_keeps_the_place_that_is_given(given: dict[str, Any]) -> None:
    run = Run(Path("run"))
    begun = Options.model_validate(given)
    assert options_to_resume(begun, run).model_dump(exclude_unset=True).keys() & {"model", "data"} == set()
    moved = Options(resume="run", model="base")
    assert options_to_resume(moved, run).model == "base"

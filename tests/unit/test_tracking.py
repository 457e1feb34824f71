"""What a training tells its trackers: a library that fails, hangs or is missing costs no training."""

import json
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from common.backend import Memory
from common.commands.train import run_training
from common.display import Display
from common.errors import UserError
from common.option_fields import TRACKERS, TrackFields
from common.options import Options
from common.report import trackers, tracking
from common.report.tracking import check_trackers, tracked
from common.run_record import Run
from tests import ROOT
from tests.contexts import context
from tests.report_run import metrics, write_run
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

KEY = "0123456789abcdef-secret"
# A package that keeps in a file what it is told. CODE runs in its init, LATER in its log.
FAKE = """
import json, os, sys, time
from types import SimpleNamespace

def keep(what, *args):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps([what, *args], default=vars) + "\\n")

class Settings(SimpleNamespace):
    sync_dir = "offline-run"

class Table(SimpleNamespace):
    pass

class Artifact:
    def __init__(self, name, type):
        self.name, self.files = type, []
    def add_dir(self, path):
        self.files += sorted(os.listdir(path)) + [open(path + "/adapter_config.json").read()]
    add_file = add_dir

class Run:
    url, settings = None, Settings()
    def __init__(self, settings):
        self.id = settings["id"]
        keep("init", settings)
        CODE
    def define_metric(self, *args, **settings): pass
    def log(self, line):
        keep("log", line)
        LATER
    def log_artifact(self, artifact): keep("artifact", artifact.name, artifact.files)
    def finish(self, exit_code): keep("finish", exit_code)

def init(**settings): return Run(settings)
"""
MEMORY = Memory(used=3, peak=4, total=5, kind="rss", swap=0)
Line = list[Any]


class Fake:
    """A wandb that can be imported, and what it was told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.package = folder / "calls.jsonl", folder / "packages"
        self.package.mkdir()
        self.write()
        monkeypatch.setenv("FAKE_LOG", str(self.log))
        monkeypatch.setenv("PYTHONPATH", str(self.package))
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.syspath_prepend(str(self.package))

    def write(self, code: str = "pass", later: str = "pass") -> None:
        (self.package / "wandb.py").write_text(FAKE.replace("CODE", code).replace("LATER", later))

    def calls(self) -> list[Line]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def logged(self) -> list[dict[str, Any]]:
        return [call[1] for call in self.calls() if call[0] == "log"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    return Fake(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(write_run(tmp_path / "run"))


def options(**given: Any) -> Options:
    return Options.model_validate({"track": ["wandb"]} | given)


def go(run: Run, given: Options, steps: int = 3, after: int = 0) -> None:
    """Track so many steps, a validation and its answers."""
    answer = {"step": 3, "number": 0, "prompt": "Who?", "reference": "Pip", "answer": "I am Pip", "ended": True}
    with tracked(run, given, after, Display("plain")) as tracking:
        for line in metrics(steps):
            if "loss" in line:
                tracking.step(line, MEMORY)
        tracking.evaluation({"step": steps, "valid_loss": 2.5})
        tracking.answers([answer])


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


# --- what is told


def test_figures_recipe_and_the_end_are_told_and_no_text(fake: Fake, run: Run) -> None:
    go(run, options())
    init, *_, last = fake.calls()
    assert (last, init[1]["project"], init[1]["resume"]) == (["finish", 0], "twintune", "allow")
    assert init[1]["name"] == f"base-{run.record.recipe_hash[:8]}"  # a folder's name by default holds the rows' file
    assert (init[1]["config"]["rank"], init[1]["config"]["data_hash"]) == (16, "beef")
    assert init[1]["config"]["model"] == "some/base"
    logged = fake.logged()
    assert [line["step"] for line in logged] == [1, 2, 3, 3, 40]
    assert logged[1] == {
        "step": 2,
        "train/loss": 2.0,
        "train/learning_rate": 5e-4,
        "train/grad_norm": 3.0,
        "train/tokens_per_second": 200.0,
        "memory/used_bytes": 3,
        "memory/peak_bytes": 4,
        "memory/swap_bytes": 0,
    }
    assert logged[3] == {"step": 3, "eval/loss": 2.5}
    assert logged[4]["summary/test_loss"] == 0.3
    told = fake.log.read_text()
    assert "rows.jsonl" not in told
    assert "Pip" not in told


def test_answers_are_told_where_text_is_asked_for(fake: Fake, run: Run) -> None:
    go(run, options(track_text=True))
    (table,) = [line["samples"] for line in fake.logged() if "samples" in line]
    assert table == {"columns": ["prompt", "reference", "answer"], "data": [["Who?", "Pip", "I am Pip"]]}


def test_a_resumed_run_continues_the_trackers_run(fake: Fake, run: Run) -> None:
    go(run, options())
    known = run.record.trackers["wandb"]
    go(run, options(track_project="mine"), after=3)
    first, second = [call[1] for call in fake.calls() if call[0] == "init"]
    assert first["id"] == second["id"] == known
    assert second["project"] == "mine"


def test_a_run_has_the_name_of_the_folder_that_was_asked_for(fake: Fake, run: Run) -> None:
    run.update(options=run.record.options | {"output": "runs/mine"})
    go(run, options())
    assert fake.calls()[0][1]["name"] == "run"


def test_an_id_that_no_record_may_hold_is_not_kept(fake: Fake, run: Run) -> None:
    fake.write("self.id = 'my run (1)'")
    go(run, options())
    assert Run(run.path).record.trackers == {}


def test_where_a_run_is_shown_holds_no_password(fake: Fake, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.write("self.url = 'https://me:secret@host/run'")
    go(run, options())
    assert "https://***@host/run" in capsys.readouterr().out.replace("\n", "")


def test_an_adapter_is_sent_without_paths_of_this_machine(fake: Fake, run: Run) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (run.adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/base"}))
    go(run, options(track_artifacts=["adapter"]))
    (sent,) = [call for call in fake.calls() if call[0] == "artifact"]
    assert (sent[1], sent[2][:2]) == ("model", ["adapter_config.json", "adapter_model.safetensors"])
    assert json.loads(sent[2][2])["base_model_name_or_path"] == "base"


def test_a_run_that_fails_is_told_as_such(fake: Fake, run: Run) -> None:
    with pytest.raises(KeyboardInterrupt), tracked(run, options(), 0, Display("quiet")):
        raise KeyboardInterrupt
    assert fake.calls()[-1] == ["finish", 1]


def test_without_trackers_nothing_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "running", None)
    go(run, options(track=[]))


# --- what fails


@pytest.mark.parametrize(
    ("code", "later", "why"),
    [
        ("raise ConnectionError('no route to host')", "pass", "ConnectionError: no route to host"),
        ("sys.exit('api_key not configured (no-tty)')", "pass", "SystemExit: api_key not configured (no-tty)"),
        ("raise ValueError('bad key ' + os.environ['WANDB_API_KEY'])", "pass", "ValueError: bad key ***"),
        ("raise OSError('https://me:pw@host refused')", "pass", "OSError: https://***@host refused"),
        ("pass", "raise OSError(28, 'No space left on device')", "OSError: [Errno 28] No space left on device"),
        ("os.kill(os.getpid(), 9)", "pass", "its process has ended"),
        ("import no_such_module", "pass", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
@pytest.mark.slow
def test_a_tracker_that_fails_is_dropped_with_one_warning_and_said_at_the_end(
    fake: Fake, run: Run, capsys: pytest.CaptureFixture[str], code: str, later: str, why: str
) -> None:
    fake.write(code, later)
    go(run, options())
    assert warnings(capsys) == [
        f"warning: wandb is dropped, and nothing else changes: {why}",
        f"warning: wandb has not got the complete run: {why}",
    ]


def test_a_tracker_that_hangs_holds_no_step_and_the_end_not_long(
    fake: Fake, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.write("time.sleep(600)")
    monkeypatch.setattr(tracking, "_SECONDS", 0.5)
    began = time.monotonic()
    go(run, options(), steps=5000)  # more than the pipe holds
    assert time.monotonic() - began < 10
    assert warnings(capsys)[-1] == "warning: wandb has not got the complete run: it has not ended in time"


def test_a_tracker_that_does_not_keep_up_is_dropped_while_training(
    fake: Fake, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.write("time.sleep(600)")
    monkeypatch.setattr(tracking, "_HELD", 100_000)
    go(run, options(), steps=3000)
    assert "it does not keep up with the training" in warnings(capsys)[0]


def test_what_a_tracker_prints_is_not_shown(fake: Fake, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    fake.write("print('hello from a library'); sys.stderr.write('hello'); assert sys.stdin.read() == ''")
    go(run, options())
    out, err = capfd.readouterr()
    assert "hello" not in out + err
    assert fake.calls()[-1] == ["finish", 0]


# --- what is checked before training


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swanlab").mkdir()  # as a tracker leaves it behind: no package
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_trackers(["swanlab"])
    assert caught.value.what == "--track swanlab: its package is not installed."
    assert caught.value.fix == "Install it: pip install 'twintune[swanlab]'"


def test_each_tracker_has_an_adapter_and_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (literal,) = get_args(TrackFields.model_fields["track"].annotation)
    assert set(get_args(literal)) == set(TRACKERS) == trackers.TRACKERS.keys() <= extras.keys()
    assert all(extras[name][0].startswith(f"{name}>=") and ",<" in extras[name][0] for name in TRACKERS)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"track": "comet"}, "Input should be 'tensorboard', 'wandb'"),
        ({"track": ["wandb", "wandb"]}, "track: wandb is given twice"),
        ({"track": [], "track_text": True}, "track_text is for trackers, and none is given"),
        ({"track": [], "track_project": "p"}, "track_project is for trackers, and none is given"),
        ({"track_text": True, "no_text": True}, "track_text and no_text cannot be combined"),
        ({"track_artifacts": ["report"]}, "the report quotes rows and answers"),
        ({"track_artifacts": ["adapter"], "method": "full"}, "method full makes no adapter"),
        ({"track": "tensorboard", "track_artifacts": ["adapter"]}, "tensorboard keeps no files"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        options(**given)


def test_a_resumed_run_brings_its_trackers() -> None:
    assert Options.model_validate({"resume": "run", "track_text": True}).track_text


def test_trackers_may_be_given_by_commas() -> None:
    assert options(track="wandb,mlflow").track == ["wandb", "mlflow"]


# --- a training


def test_a_training_is_tracked_and_resumed(fake: Fake, tiny_llama: Path, tmp_path: Path) -> None:
    given = {
        "model": str(tiny_llama),
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "output": str(tmp_path / "run"),
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "steps": 4,
        "eval_every": 2,
    }
    run_training(options(**given), context(create=Bigram))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {line["step"]: line["train/loss"] for line in fake.logged() if "train/loss" in line} == losses
    validated = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    assert {line["step"]: line["eval/loss"] for line in fake.logged() if "eval/loss" in line} == validated
    told = fake.log.read_text()
    assert not any(word in told for word in ("rows.jsonl", "Say x", "it is!", KEY))
    fake.log.unlink()
    run_training(Options.model_validate({"resume": str(tmp_path / "run"), "steps": 6}), context(create=Bigram))
    assert fake.calls()[0][1]["id"] == Run(tmp_path / "run").record.trackers["wandb"]
    assert [line["step"] for line in fake.logged() if "train/loss" in line] == [5, 6]

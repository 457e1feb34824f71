"""A training process and the ways in which it is stopped from outside: what it had learned is on disk in time."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.training import checkpoint
from tests import ROOT
from tests.tiny import write_model, write_rows

SECONDS = 20  # from the signal to a process that is gone and a checkpoint that is there
START = 400  # until the first steps are done, after a validation of all rows; on a machine that does other things too


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of many quick steps, with a validation that takes long: a row at a time."""
    place = tmp_path_factory.mktemp("stops")
    model, data = write_model(place / "model"), place / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 24)
    write_rows(data / "valid.jsonl", 4000)
    given = ("--model", model, "--data", data, "--backend", "torch", "--device", "cpu", "--precision", "fp32")
    given += ("--export", "none", "--rank", 2, "--steps", 100_000, "--micro-batch-tokens", 1, "--eval-rows", 4000)
    return [sys.executable, str(ROOT / "cli.py"), "train", *map(str, given)]


def wait_for(what: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saved(run: Path) -> int:
    found = checkpoint.latest(run)
    assert found is not None
    assert json.loads((run / "run.json").read_text())["steps"] == found[0].step
    return found[0].step


def test_a_terminal_that_hangs_up_leaves_a_checkpoint(words: list[str], tmp_path: Path) -> None:
    """As a dropped ssh session does: SIGHUP, and from then on every write to the terminal fails."""
    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        rare = ["--eval-every", "100000", "--save-every", "100000", "--output", str(run)]
        os.execv(sys.executable, [*words, *rare])
    os.set_blocking(terminal, False)

    def reads() -> bool:
        try:
            os.read(terminal, 1 << 16)  # or it would wait for room
        except BlockingIOError:
            pass
        return steps(run) > 20

    wait_for(reads, START)
    os.close(terminal)
    status: list[int] = []

    def ended() -> bool:
        pid, how = os.waitpid(child, os.WNOHANG)
        status.extend([how] if pid else [])
        return pid != 0

    wait_for(ended, SECONDS)
    assert os.waitstatus_to_exitcode(status[0]) == 130
    assert saved(run) > 20


@pytest.mark.parametrize(
    ("number", "save_every", "code"),
    [
        pytest.param(signal.SIGTERM, 100_000, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 100_000, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 20, -signal.SIGKILL, marks=pytest.mark.long),
    ],
    ids=["TERM", "HUP", "KILL"],
)
def test_a_stop_within_a_validation_leaves_a_checkpoint(
    words: list[str], tmp_path: Path, number: int, save_every: int, code: int
) -> None:
    run = tmp_path / "run"
    given = ["--eval-every", "20", "--save-every", str(save_every), "--output", str(run)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*words, *given], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    wait_for(lambda: steps(run) == 20, START)
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(SECONDS) == code
    assert (run / "metrics.jsonl").read_text().count("valid_loss") == 1  # that before the first step
    found = checkpoint.latest(run)
    assert found is not None
    assert (found[0].step, found[0].evaluated) == (20, 0)
    text = (tmp_path / "log").read_text()
    if number != signal.SIGKILL:
        assert "stopping: the step is finished and saved first" in text
        assert f"--resume {run}" in " ".join(text.split())

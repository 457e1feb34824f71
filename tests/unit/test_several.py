"""How a training on several devices is started, before any process is."""

import os
import socket
from pathlib import Path

import pytest

from cli import _backend
from common.commands import several
from common.commands.train import run_training
from common.context import Context
from common.display import Display
from common.errors import RankLost, UserError
from common.options import Options
from common.run_record import Run
from common.system.launch import Launch, launched
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}


def test_without_a_launcher_there_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    assert launched() is None


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", TORCHRUN)
    assert launched() == Launch("torch", 3, 1, f"{socket.gethostname()} {os.getppid()}", 2)
    monkeypatch.setattr(os, "environ", TORCHRUN | {"TORCHELASTIC_RUN_ID": "job-7"})
    assert launched() == Launch("torch", 3, 1, "job-7", 2)


def test_what_mlx_launch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"MLX_RANK": "1", "MLX_HOSTFILE": "hosts.json"})
    assert launched() == Launch("mlx", 1, 0, "")


def test_a_restart_continues_the_newest_run_of_its_launch(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 12)
    options = Options(model=str(tiny_llama), data="rows.jsonl", backend="torch", device="cpu", steps=2, export="none")
    for name in ("job-1", "job-2"):
        monkeypatch.setattr("common.commands.new_run.launched", lambda name=name: Launch("torch", 0, 0, name))
        run_training(options, context(create=Bigram))
    first = Path("runs") / "tiny-llama-rows-torch"
    assert Run(first).record.launch == "job-1"
    again = several.restarted(options, Launch("torch", 0, 0, "job-1", restarts=1))
    assert (again.resume, again.model) == (str(first), None)
    assert several.restarted(options, Launch("torch", 0, 0, "job-3", restarts=1)) is options
    assert several.restarted(options, Launch("torch", 0, 0, "job-1")) is options
    other = options.model_copy(update={"model": "another"})  # a name that was used before
    assert several.restarted(other, Launch("torch", 0, 0, "job-1", restarts=1)) is other
    (Path("runs") / "broken").mkdir()
    (Path("runs") / "broken" / "run.json").write_text("{")
    longer = Options(resume=str(first), steps=2, micro_batch_tokens=50)
    again = several.restarted(longer, Launch("torch", 0, 0, "job-1", restarts=1))
    assert (again.resume, again.steps, again.micro_batch_tokens) == (str(first), None, 50)
    longer = Options(resume=str(first), steps=9)
    assert several.restarted(longer, Launch("torch", 0, 0, "job-1", restarts=1)) is longer
    named = options.model_copy(update={"output": str(first)})
    assert several.restarted(named, Launch("torch", 0, 0, "job-1", restarts=1)).resume == str(first)


@pytest.mark.parametrize(("backend", "launcher"), [("mlx", "torchrun"), ("torch", "mlx.launch")])
def test_a_launcher_decides_the_backend(backend: str, launcher: str) -> None:
    launch = Launch("torch" if launcher == "torchrun" else "mlx", 0, 0, "")
    with (
        pytest.raises(UserError, match=f"--backend {backend}: {launcher} has started this"),
        several.first_rank(Options(backend=backend), context(), launch),
    ):
        pass


def test_more_devices_than_there_are_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("cuda", 2)
    monkeypatch.setattr("common.commands.several.choose_backend", lambda wanted, backends: Named())
    one = Context(lambda name: package, Display("quiet"))
    with pytest.raises(UserError, match="--devices 3: 2 GPUs are here"):
        several.start(Options(devices="3"), one)
    assert several.start(Options(devices="all"), one) == 2
    assert several.start(Options(devices="2"), one) == 2
    assert several.counted(Options(devices="all"), one).devices == "2"
    with pytest.raises(UserError, match="--devices 2: 1 GPU is here"):
        several.start(Options(devices="2"), Context(lambda name: Package("gpu", 1), Display("quiet")))
    assert several.start(Options(devices="5"), Context(lambda name: Package("cpu", 1), Display("quiet"))) == 5


@pytest.mark.parametrize("output", ["runs/mine", None])
def test_a_lost_rank_0_has_its_run_named_by_the_launcher(
    output: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.commands.several.choose_backend", lambda wanted, backends: Named())
    for name, changed in (("before", 5), ("mine", None)):
        record = Path("runs", name, "run.json")
        record.parent.mkdir(parents=True)
        record.write_text("{}")
        if changed:
            os.utime(record, (changed, changed))
    package = Package("cpu", 1, RankLost("SIGKILL", "rank 0"))
    one = Context(lambda name: package, Display("plain"))
    monkeypatch.setattr("time.time", lambda: Path("runs/mine/run.json").stat().st_mtime)
    with pytest.raises(RankLost):
        several.start(Options(devices="2", output=output), one)
    assert "To continue: python cli.py train --resume runs/mine\n" in capsys.readouterr().out
    monkeypatch.setattr("time.time", lambda: Path("runs/mine/run.json").stat().st_mtime + 1)
    with pytest.raises(RankLost):  # before it has written anything
        several.start(Options(devices="2", output=output), one)
    assert "To continue" not in capsys.readouterr().out


class Named:
    value = "torch"


class Package:
    def __init__(self, device: str, count: int, fault: RankLost | None = None) -> None:
        self.device, self.count, self.fault = device, count, fault

    def choose_device(self, wanted: str) -> "Named":
        found = Named()
        found.value = self.device
        return found

    def device_count(self, device: str) -> int:
        return self.count

    def launch(self, count: int, command: list[str]) -> int:
        if self.fault:
            raise self.fault
        return count


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5", ""])
def test_devices_are_a_number_or_all(given: str) -> None:
    with pytest.raises(ValueError, match="must be a number from 1, or all"):
        Options(devices=given)


def test_what_has_ended_is_said_shortly() -> None:
    text = "[/src/gloo/pair.cc:553] Connection closed by peer [10.0.0.7]:99. This is typically caused by a crash."
    assert RankLost(text, "rank 1").what == "rank 1 has ended: Connection closed by peer [10.0.0.7]:99"


def test_the_packages_know_their_devices() -> None:
    torch, mlx = _backend("torch"), _backend("mlx")
    assert (torch.device_count("cpu"), mlx.device_count("cpu")) == (1, 1)
    assert torch.rank_device("cpu", 3) == mlx.rank_device("cpu", 3) == "cpu"


def test_ranks_go_round_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_backend.devices.cards", lambda: ["card", "card"])
    torch = _backend("torch")
    assert [torch.rank_device("auto", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert torch.rank_device("cuda:1", 0) == "cuda:1"

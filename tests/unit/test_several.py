"""How a training on several devices is started, before any process is."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from cli import _backend
from common.commands import several
from common.commands.train import run_training
from common.context import Context
from common.display import Display
from common.errors import RankLost, UserError
from common.options import Options
from common.run_record import Run
from common.system.launch import Launch, free_cores, launched, share_cores
from common.training.messages import decoded
from common.training.ranked_backend import RankedPackage
from common.training.ranks import Member, Ranks
from common.training.shared_backend import SharedPackage
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


def test_a_lost_rank_0_has_its_run_named_by_the_launcher(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.commands.several.choose_backend", lambda wanted, backends: Named())
    for name in ("mine", "other"):
        write_rows(tmp_path / f"{name}.jsonl", 12)
        options = Options(
            **{"model": str(tiny_llama), "data": f"{name}.jsonl", "backend": "torch", "device": "cpu", "steps": 2},
            export="none",
            output=f"runs/{name}",
        )
        run_training(options, context(create=Bigram))
    changed = Run(Path("runs/mine")).record_file.stat().st_mtime
    one = Context(lambda name: Package("cpu", 1, RankLost("SIGKILL", "rank 0")), Display("plain"))
    mine = options.model_copy(update={"data": ["mine.jsonl"], "devices": "2", "output": None})
    for given, began, named in (
        (mine, changed, True),
        (mine.model_copy(update={"output": "runs/mine"}), changed, True),
        (Options(resume="runs/mine", devices="2"), changed, True),
        (mine, changed + 1, False),  # before it has written anything
        (mine.model_copy(update={"output": "runs/none"}), changed, False),
    ):
        monkeypatch.setattr("time.time", lambda began=began: began)
        capsys.readouterr()
        with pytest.raises(RankLost):
            several.start(given, one)
        assert ("To continue: python cli.py train --resume runs/mine\n" in capsys.readouterr().out) == named


class Told:
    """A group whose other ranks hear what rank 0 tells."""

    def __init__(self) -> None:
        self.size, self.rank, self.heard = 2, 0, list[str]()

    def broadcast(self, data: bytes | None) -> bytes:
        self.heard.append(decoded(data or b"").kind)
        return b""

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array, array]

    def close(self) -> None:
        self.heard.append("closed")


@pytest.mark.parametrize("exports", [True, False])
def test_what_follows_a_training_on_several_ranks_is_done_by_rank_0_alone(
    exports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, one = Told(), context()
    ranks = Ranks(group, [Member(rank, "here", 1, "cpu", 10, "memory") for rank in range(2)])
    monkeypatch.setattr(several, "_join", lambda *given: (one.backends("torch"), ranks))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TWINTUNE_SHARED_CORES", "OMP_NUM_THREADS")
    with several.first_rank(Options(), one, Launch("torch", 0, 0, "")) as (_, training):
        assert isinstance(training.backends("torch"), RankedPackage)
        if exports:
            alone = training.after_training()
            assert (alone.backends, alone.after_training()) == (one.backends, alone)
            assert group.heard == ["end", "closed"]
            assert "OMP_NUM_THREADS" not in os.environ
    assert group.heard == ["end", "closed"]


def test_after_a_training_with_workers_this_computer_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINTUNE_SECRET", "a secret that nobody guesses")
    one = context()
    with several.workers(Options.model_validate({"with": ["127.0.0.1:1"]}), one) as training:
        assert isinstance(training.backends("torch"), SharedPackage)
        assert training.after_training().backends is one.backends
    assert one.after_training() is one


@pytest.mark.parametrize(("given", "shared"), [({}, "2"), ({"OMP_NUM_THREADS": "5"}, "5")])
def test_ranks_share_the_cores_unless_the_user_says_otherwise(
    given: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr("common.system.launch.physical_cores", lambda: 6)
    os.environ |= share_cores(3)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == (shared, "2")
    free_cores()
    assert os.environ == given


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

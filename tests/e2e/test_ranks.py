"""Trainings on several devices as a user starts them: each rank a process, over gloo or MLX's ring."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.models.adapter_files import read_trained
from common.run_record import Run
from common.training import checkpoint
from tests import ROOT
from tests.e2e.command_line import twintune
from tests.e2e.test_stops import saved, steps, wait_for
from tests.tiny import write_model, write_rows

FOREVER = ("--steps", 100_000, "--patience", 0, "--eval-every", 100_000)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("ranks")
    model, data = write_model(place / "model"), place / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", 24, longest=90)
    write_rows(data / "valid.jsonl", 11)
    words = ("--model", model, "--data", data, "--device", "cpu", "--precision", "fp32", "--export", "none")
    return [*map(str, words), "--batch-size", "6"]


def losses(run: Path) -> np.ndarray:
    """Those of steps and validations, in their order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([line.get("loss", line.get("valid_loss")) for line in lines])


def arrays(run: Path) -> dict[str, np.ndarray]:
    return read_trained(run, 2).arrays()


@pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("torch", "full"),
        ("mlx", "lora"),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("torch", "lora"), ("mlx", "full"))),
    ],
)
def test_ranks_give_the_curve_and_the_adapter_of_one_device(
    backend: str, method: str, given: list[str], tmp_path: Path
) -> None:
    more = ["--backend", backend, "--method", method, "--steps", "12", "--eval-every", "4"]
    words = ["train", *(word.replace("none", "fused") for word in given), *more]
    twintune(*words, "--output", tmp_path / "one")
    twintune(*words, "--devices", 3, "--output", tmp_path / "three")  # and rank 0 alone exports
    one, three = (Run(tmp_path / name) for name in ("one", "three"))
    assert (one.plan.ranks, three.plan.ranks) == (1, 3)
    assert one.recipe.hash() == three.recipe.hash()
    np.testing.assert_allclose(losses(three.path), losses(one.path), rtol=1e-5)
    for name, array in arrays(one.path).items():
        np.testing.assert_allclose(arrays(three.path)[name], array, atol=2e-5)
    alone, together = (load_file(run.fused / "model.safetensors") for run in (one, three))
    for name, tensor in alone.items():
        np.testing.assert_allclose(together[name], tensor, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_rank_that_is_killed_ends_the_run_by_name_and_it_continues(
    backend: str, given: list[str], tmp_path: Path
) -> None:
    """On the same number of ranks to the same bits, and on one device up to rounding."""
    words = ["train", *given, "--backend", backend, "--steps", "60", "--save-every", "10", "--patience", "0"]
    twintune(*words, "--devices", 2, "--output", tmp_path / "reference")
    run = tmp_path / "killed"
    with started([*words, "--devices", "2", "--output", str(run)], tmp_path / "log") as process:
        wait_for(lambda: steps(run) > 15, 120)
        victim = ranks(process)[1]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(60) == 1
    assert f"rank 1 (process {victim} on " in (tmp_path / "log").read_text()
    assert f"--resume {run}" in (tmp_path / "log").read_text()
    assert checkpoint.latest_step(run) == 10
    shutil.copytree(run, tmp_path / "alone")
    twintune("train", "--resume", run, "--devices", 2)
    assert all(np.array_equal(arrays(run)[name], array) for name, array in arrays(tmp_path / "reference").items())
    assert np.array_equal(losses(run), losses(tmp_path / "reference"))
    twintune("train", "--resume", tmp_path / "alone")
    assert [plan["ranks"] for plan in Run(tmp_path / "alone").record.plans] == [2, 1]
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(run), rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("mlx", marks=pytest.mark.long)])
def test_one_ctrl_c_saves_and_ends_all(backend: str, given: list[str], tmp_path: Path) -> None:
    run, words = tmp_path / "run", ["train", *given, *FOREVER, "--backend", backend, "--devices", 2]
    with started([*words, "--output", run], tmp_path / "log") as process:
        wait_for(lambda: steps(run) > 15, 120)
        pids = ranks(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert saved(run) > 15
    text = (tmp_path / "log").read_text()
    assert "stopping: the step is finished and saved first" in text
    assert "error" not in text


@pytest.mark.long
def test_torchrun_starts_again_and_the_run_continues(given: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    words = [str(ROOT / "cli.py"), "train", *given, "--steps", "60", "--save-every", "10", "--patience", "0"]
    with started([*words, "--output", str(run)], tmp_path / "log", torchrun) as process:
        wait_for(lambda: steps(run) > 15, 120)
        os.kill(ranks(process)[1], signal.SIGKILL)
        assert process.wait(120) == 0
    assert Run(run).record.status == "complete"
    assert losses(run).size == 60 + 1 + Run(run).record.steps // Run(run).recipe.eval_every


@pytest.mark.long
@pytest.mark.parametrize(("precision", "count"), [("fp32", 3), ("bf16", 2)])
def test_sharding_an_adapters_base_changes_no_bit(precision: str, count: int, given: list[str], tmp_path: Path) -> None:
    words = ["train", *given, "--backend", "torch", "--steps", "8", "--eval-every", "4"]
    words[words.index("fp32")] = precision
    words += ["--micro-batch-tokens", "150", "--devices", str(count)]  # ranks have different numbers of micro-batches
    twintune(*words, "--output", tmp_path / "complete")
    twintune(*words, "--shard", "--output", tmp_path / "sharded")
    complete, sharded = (Run(tmp_path / name) for name in ("complete", "sharded"))
    assert (complete.plan.sharded, sharded.plan.sharded) == (False, True)
    assert losses(sharded.path).tolist() == losses(complete.path).tolist()
    for name, array in arrays(complete.path).items():
        np.testing.assert_array_equal(arrays(sharded.path)[name], array)
    if precision == "fp32":  # it is generated without a cache, which in bf16 rounds otherwise
        assert sharded.record.export.sample == complete.record.export.sample


@pytest.mark.long
def test_every_weight_is_trained_in_shards_and_continued_without(given: list[str], tmp_path: Path) -> None:
    words = ["train", *given, "--backend", "torch", "--method", "full", "--steps", "6", "--eval-every", "3"]
    twintune(*words, "--output", tmp_path / "one")
    twintune(*words, "--gradient-checkpointing", "--devices", 2, "--shard", "--output", tmp_path / "two")
    for length, devices in ((9, 2), (12, 1)):
        twintune("train", "--resume", tmp_path / "one", "--steps", length)
        twintune("train", "--resume", tmp_path / "two", "--steps", length, "--devices", devices)
        assert Run(tmp_path / "two").plan.sharded == (devices == 2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    for name, array in arrays(tmp_path / "one").items():
        np.testing.assert_allclose(arrays(tmp_path / "two")[name], array, atol=2e-5)


def test_a_worker_of_the_other_backend_gives_the_same_curve(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINTUNE_SECRET", "a secret that nobody guesses")
    words = ["train", *given, "--backend", "torch", "--steps", "12", "--eval-every", "4"]
    log = tmp_path / "worker.log"
    with started(["worker", "--backend", "mlx", "--device", "cpu", "--port", "0"], log) as worker:
        wait_for(lambda: "listens on" in log.read_text(), 60)
        address = log.read_text().partition("listens on ")[2].partition(";")[0]
        twintune(*words, "--with", address, "--output", tmp_path / "two")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 130
    twintune(*words, "--output", tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    here, there = Run(tmp_path / "two").record.shares
    assert (here["what"], there["what"]) == ("torch on cpu", "mlx on cpu")
    assert there["tokens"] > 0
    assert "100%" not in twintune("compare", tmp_path / "one", tmp_path / "two").partition("computed by")[2]


def test_bad_input_is_said_once(given: list[str], tmp_path: Path) -> None:
    text = twintune("train", *given, "--devices", 2, "--data", tmp_path / "nothing.jsonl", code=1)
    assert text.count("error:") == 1
    assert "nothing.jsonl" in text


def started(words: list[object], log: Path, before: list[str] | None = None) -> subprocess.Popen:
    program = before if before is not None else [str(ROOT / "cli.py")]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
        )


def ranks(process: subprocess.Popen) -> list[int]:
    """The processes' ids, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            env = dict(entry.partition(b"=")[::2] for entry in path.read_bytes().split(b"\0"))
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process.pid and (rank := env.get(b"RANK") or env.get(b"MLX_RANK")):
            found[int(rank)] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]

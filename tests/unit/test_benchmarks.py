"""The scripts of benchmarks/ that run others: what fails is noted, and what comes after it is still measured."""

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import (
    beside,
    commit,
    graphs,
    mac,
    memory,
    nvidia,
    peer_environments,
    peer_runs,
    peers,
    random_model,
    regret_data,
    stages,
    step_time,
)
from benchmarks.one_step import job_of
from mlx_backend.memory_terms import loss_chunk
from tests import backends

SCRIPTS = (graphs, memory, peers, random_model, step_time)
CASE = {"backend": "torch", "model": "smollm2-135m", "precision": "fp32", "rows": 1, "width": 8}


def test_a_failing_configuration_is_a_row_and_the_next_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(case: dict[str, Any]) -> dict[str, Any]:
        if case["rows"] == 1:
            raise memory.Failed("Error: no | memory")
        return {"case": case, "predicted": 110, "peak": 100, "parts": {"weights": 50, "loss": 60}}

    monkeypatch.setattr(memory, "run", run)
    monkeypatch.setattr(memory, "CASES", [CASE, CASE | {"rows": 2}])
    monkeypatch.setattr(sys, "argv", ["memory", "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| torch fp32 smollm2-135m, 1 x 8 tokens | | | | failed: Error: no / memory |"
    assert "+10.0%" in lines[3]
    assert lines[-1] == "1 of 2 configurations measured, the worst 10.0% away"
    assert json.loads((tmp_path / "found.json").read_text())[0]["fault"] == "Error: no | memory"


def test_real_sizes_name_their_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(case: dict[str, Any]) -> dict[str, Any]:
        raise memory.Failed("killed")

    monkeypatch.setattr(memory, "run", run)
    assert [result["fault"] for result in memory.real_sizes(memory.REAL)] == ["killed"] * len(memory.REAL)
    assert capsys.readouterr().out.count("| failed: killed |") == len(memory.REAL)


def test_a_failing_process_is_named_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(memory.Failed, match="KeyError: 'nothing'"):
        memory.run(CASE | {"model": "nothing"})


def test_stages_all_run_and_say_whether_one_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {"commit": commit})
    out, home = tmp_path / "report.json", str(Path.home())
    say = ["-c", "import os; print(os.environ['COLUMNS'], os.path.expanduser('~'))"]
    assert not stages.run_stages({"bad": [["-c", "raise SystemExit(3)"]], "good": [say]}, out, stages.hidden_paths())
    report = json.loads(out.read_text())["stages"]
    assert report["bad"][0]["status"] == 3
    assert report["good"][0]["output"] == "200 ~\n"
    assert home not in out.read_text()
    assert stages.run_stages({"late": [say]}, out, {}, minutes=0), "what the time does not allow has not failed"


def test_a_stage_has_its_own_time_and_keeps_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {"commit": commit})
    out, figures, script = tmp_path / "report.json", tmp_path / "figures.json", tmp_path / "hangs.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "pathlib.Path(sys.argv[2]).write_text('[1]')\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    hangs = [[str(script), "--json", str(figures)], ["-c", ""]]
    wanted = {"hangs": hangs, "next": [["-c", "print('measured')"]]}
    assert not stages.run_stages(wanted, out, {}, "4f2636b", minutes=1, limits={"hangs": 3.0})
    report = json.loads(out.read_text())
    late, skipped = report["stages"]["hangs"]
    assert (late["status"], late["figures"]) == ("ended: its 3 s were over", [1])
    started = int(late["output"])  # by the command
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert skipped["status"] == "not begun: its 3 s were over"
    assert report["stages"]["next"][0]["output"] == "measured\n"
    assert report["calls"] == [{"commit": "4f2636b"}]


def test_a_second_call_runs_what_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {})
    out, file = tmp_path / "report.json", tmp_path / "there"
    needs = ["-c", f"open({str(file)!r})"]
    wanted = {"fails": [["-c", ""], needs], "good": [["-c", ""]], "new": [["-c", ""]]}
    assert not stages.run_stages({name: wanted[name] for name in ("fails", "good")}, out, {})
    file.touch()
    capsys.readouterr()
    assert stages.run_stages(wanted, out, {})
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("    ")]
    assert shown[:3] == ["new ...", "fails ...", "good: done before"]
    found = json.loads(out.read_text())["stages"]
    assert [(result["call"], result["status"]) for result in found["fails"]] == [(1, 0), (1, 1), (2, 0), (2, 0)]
    assert [result["call"] for result in found["good"]] == [1]


@pytest.mark.parametrize(
    ("change", "repeated"),
    [({}, False), ({"commit": "other"}, True), ({"gpus": ["an H200"]}, True), ({"calls": 7}, False)],
)
def test_what_was_done_elsewhere_or_at_another_commit_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], repeated: bool
) -> None:
    out, facts = tmp_path / "report.json", {"commit": "1", "gpus": [], "processor": "a CPU"}
    wanted: stages.Stages = {"good": [["-c", "print(1)"]]}
    for known in (facts, facts | change):
        monkeypatch.setattr(stages, "facts", lambda commit, known=known: known)
        assert stages.run_stages(wanted, out, {})
    assert [result["call"] for result in json.loads(out.read_text())["stages"]["good"]] == [1, 2][: 1 + repeated]
    assert stages.run_stages({"good": [["-c", "print(2)"]]}, out, {})
    assert json.loads(out.read_text())["stages"]["good"][-1]["output"] == "2\n"


@pytest.mark.parametrize(
    ("runs", "complete"),
    [
        ({"a": [{"loss": 1.0}], "b": [{"loss": 2.0}]}, True),
        ({"a": [{"loss": 1.0}], "b": [{"failed": "late"}]}, False),
        ({"a": [{"loss": 1.0}], "b": []}, False),
        ({"a": [{"loss_failed": "memory"}]}, False),
        ({}, False),
    ],
)
def test_peers_are_done_where_each_has_its_figures(runs: dict[str, Any], complete: bool) -> None:
    """Whatever they say: status 1 is for a loss that is worse."""
    assert stages._complete({"status": 1, "figures": {"runs": runs}}) == complete


def test_a_stage_that_was_cut_off_twice_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's commands run together: one may read what another writes."""
    monkeypatch.setattr(stages, "facts", lambda commit: {})
    out, first, second = tmp_path / "report.json", ["-c", "print(1)"], ["-c", "print(2)"]
    for _ in range(2):
        assert stages.run_stages({"a": [first]}, out, {})
        report = json.loads(out.read_text())
        report["stages"]["a"] *= 2
        out.write_text(json.dumps(report))
    assert stages.run_stages({"a": [first, second]}, out, {})
    assert [result["output"] for result in json.loads(out.read_text())["stages"]["a"]][-2:] == ["1\n", "2\n"]


def test_a_report_of_the_version_before_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {})
    out = tmp_path / "report.json"
    out.write_text('{"machine": {}, "stages": {"a": [{"status": 0}]}}')
    assert stages.run_stages({"a": [["-c", ""]]}, out, {})
    assert len(json.loads(out.read_text())["stages"]["a"]) == 1


def test_a_command_does_not_outlive_its_stages(tmp_path: Path) -> None:
    out, started = tmp_path / "report.json", tmp_path / "started"
    sleeps = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "from pathlib import Path; from benchmarks import stages; stages.facts = lambda commit: {}; "
        f"stages.run_stages({{'a': [['-c', {sleeps!r}]]}}, Path({str(out)!r}), {{}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=stages.ROOT) as process:
        while not (started.exists() and started.read_text()):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_stage_begins_only_where_half_of_its_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {})
    out, limits = tmp_path / "report.json", {"long": 900.0, "short": 30.0}
    wanted: stages.Stages = {"long": [["-c", ""]], "short": [["-c", ""]]}
    assert stages.run_stages(wanted, out, {}, minutes=1, limits=limits)
    assert [*json.loads(out.read_text())["stages"]] == ["short"]


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*command: Any, **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(commit.subprocess, "run", no_git)
    assert commit.known("4f2636b")["commit"] == "4f2636b"
    assert commit.known("")["commit"] == "unknown"


def test_paths_are_replaced_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", lambda commit: {"commit": commit})
    paths = "/home/ä/.cache/twintune and /home/ä/rows"
    hidden = {"/home/ä": "~", "/home/ä/.cache/twintune": "CACHE"}
    assert stages.run_stages({"good": [["-c", f"print({paths!r})"]]}, tmp_path / "out.json", hidden)
    (done,) = json.loads((tmp_path / "out.json").read_text())["stages"]["good"]
    assert done["output"] == "CACHE and ~/rows\n"
    assert {str(stages.cache_folder()), str(stages.ROOT), str(Path.home())} <= stages.hidden_paths().keys()


def test_a_macs_tests_and_parity_are_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run_stages(wanted: stages.Stages, *rest: Any) -> bool:
        seen.append((list(wanted), mac.os.environ["TWINTUNE_TEST_MLX_DEVICE"]))
        return False

    monkeypatch.setenv("TWINTUNE_TEST_MLX_DEVICE", "cpu")
    monkeypatch.setattr(mac, "run_stages", run_stages)
    monkeypatch.setattr(sys, "argv", ["mac", "--only", "tests", "parity"])
    with pytest.raises(SystemExit) as ended:
        mac.main()
    assert ended.value.code == 1
    assert seen == [(["tests", "parity"], "gpu")]


def test_each_backend_is_tested_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "DEVICE", "cpu")
    monkeypatch.setattr(backends, "MLX_DEVICE", "gpu")
    assert [backends.make_plan(name).device for name in ("torch", "mlx")] == ["cpu", "gpu"]


def test_a_step_on_mlxs_gpu_has_a_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_backend.free_memory", lambda device: (1000, "free"))
    monkeypatch.setattr(random_model, "cache_folder", lambda: tmp_path)
    case = CASE | {"backend": "mlx", "layers": 1, "vocabulary": 64}
    on_gpu = job_of(case | {"device": "gpu"})[2]
    assert (on_gpu.memory_budget, on_gpu.loss_chunk) == (850, loss_chunk(64, "gpu"))
    assert job_of(case)[2].memory_budget == 0


def test_random_models_are_written_within_their_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "cache_folder", lambda: tmp_path)
    found = nvidia.stages("gpu", 8, "chat-like", tmp_path)
    assert [*tmp_path.iterdir()] == []
    write, measure = found["torch: qwen3-4b"]
    assert write == ["-m", "benchmarks.random_model", "qwen3-4b"]
    assert measure[measure.index("--model") + 1] == str(random_model.folder_of("qwen3-4b"))
    assert {"twintune-lean", "unsloth-lean"} <= {*measure}
    assert "nf4" in found["nf4: qwen3-4b"][1]
    files = [
        command[command.index("--json") + 1] for stage in found.values() for command in stage if "--json" in command
    ]
    assert len(files) == len({*files})


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_every_command_of_a_stage_has_such_options(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each script's own parser reads them, and its work is not begun."""

    class Parsed(Exception):
        pass

    real = nvidia.argparse.ArgumentParser.parse_args

    def parse(self: Any, *given: Any) -> None:
        real(self, *given)
        raise Parsed

    monkeypatch.setattr(nvidia.argparse.ArgumentParser, "parse_args", parse)
    scripts = {f"benchmarks.{script.__name__.rsplit('.')[-1]}": script for script in SCRIPTS}
    every = [*nvidia.stages(device, 8, "mixed", tmp_path).values(), *mac.stages(device, tmp_path).values()]
    for command in (command for commands in every for command in commands if command[1] in scripts):
        monkeypatch.setattr(sys, "argv", command[1:])
        with pytest.raises(Parsed):
            scripts[command[1]].main()


@pytest.mark.parametrize("script", [peers, nvidia])
def test_a_single_step_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--steps", "1"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--steps: at least 2" in capsys.readouterr().err


def test_nf4_is_refused_for_peers_that_do_not_take_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", "--quantization", "nf4", "--peers", "twintune-torch", "trl"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "not trl." in capsys.readouterr().err


def test_speeds_are_with_the_first_step_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = peers.argparse.Namespace(
        model="m", data="d", steps=4, batch=1, rank=8, precision="fp32", quantization="none", rounds=1, device="cuda"
    )
    arguments.peers, arguments.json = ["twintune-torch", "unsloth"], None
    run = {"peak": 10**9, "loss": 1.0}
    peers.report(
        arguments,
        {"twintune-torch": [run | {"seconds": [5.0, 1, 1, 1]}], "unsloth": [run | {"seconds": [2.0, 2, 2, 2]}]},
        400,
        100,
    )
    ours = capsys.readouterr().out.splitlines()[-2]
    assert ours.startswith("| twintune-torch | 50.0 | 1.00x | 100.0 | 1.00x | 100.0 | 1.00x | 1.000 s |")


def test_runs_that_are_measured_neither_read_nor_write_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ran(Exception):
        pass

    def ran(*command: Any, **options: Any) -> None:
        assert options.get("env", options)["TWINTUNE_LEARN_MEMORY"] == "0"
        raise Ran

    monkeypatch.setattr(peer_runs, "run", ran)
    monkeypatch.setattr(beside.subprocess, "run", ran)
    job = {name: 8 for name in ("steps", "batch", "rank", "learning_rate", "limit")} | {
        "precision": "fp32",
        "device": "cpu",
    }
    names = {"peer": "twintune-torch", "model": "m", "rows": "r", "quantization": "nf4", "output": str(tmp_path)}
    with pytest.raises(Ran):
        peer_runs.twintune(job | names)
    with pytest.raises(Ran):
        beside._speed("torch", 1)


def test_a_peer_that_fails_is_a_row_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(peer: str, device: str) -> str:
        if peer == "trl":
            raise peer_environments.Failed("no environment | here")
        return sys.executable

    def ran(job: dict[str, Any]) -> dict[str, Any]:
        if job["peer"] == "padded":
            raise ValueError("no JSON")
        return {"seconds": [2.0, 1.0], "peak": 10**9, "adapter": job["peer"]}

    def loss(folder: Path, adapter: Path, *rest: Any) -> float:
        if adapter.name == "trl-best":
            raise ValueError("no adapter")
        return 1.0

    monkeypatch.setattr(peers, "environment", make)
    monkeypatch.setattr(peers, "RUNNERS", dict.fromkeys(peer_runs.RUNNERS, ran))
    monkeypatch.setattr(peers, "versions", lambda python: {"torch": "2"})
    monkeypatch.setattr(peers, "valid_loss", loss)
    rows_read = [peers.argparse.Namespace(ids=range(101), label_tokens=30)]
    monkeypatch.setattr(peers, "prepare", lambda *given: (rows_read, []))
    monkeypatch.setattr(peers, "resolve", lambda *given: peers.argparse.Namespace(path=tmp_path))
    names = ["trl", "twintune-torch", "padded", "trl-best"]
    found = tmp_path / "found.json"
    monkeypatch.setattr(
        sys, "argv", ["peers", "--steps", "2", "--rounds", "2", "--json", str(found), "--peers", *names]
    )
    peers.main()
    lines = capsys.readouterr().out.splitlines()
    runs = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(run["peer"], run["round"]) for run in runs] == [
        *((name, 1) for name in names),
        *(("twintune-torch", 2), ("trl-best", 2)),
    ]
    rows = {line.split(" ")[1]: line for line in lines if line.startswith("| t") or line.startswith("| p")}
    assert "failed: no environment / here" in rows["trl"]
    assert "failed: ValueError: no JSON" in rows["padded"]
    assert "failed: ValueError: no adapter" in rows["trl-best"]
    assert rows["twintune-torch"].endswith("| 1.0000 |")
    assert json.loads(found.read_text())["runs"]["twintune-torch"][0]["versions"] == {"torch": "2"}


def test_twintunes_own_failure_ends_with_status_1() -> None:
    good, failed = [{"loss": 1.0}], [{"failed": "late"}]
    assert peers.verdict({"twintune-mlx": good, "mlx_lm.lora": failed}) == ""
    assert peers.verdict({"twintune-mlx": failed, "mlx_lm.lora": good}) == "twintune-mlx failed."
    assert "is worse" in peers.verdict({"twintune-mlx": [{"loss": 1.02}], "mlx_lm.lora": good})
    assert "is worse" in peers.verdict({"twintune-mlx": [{"loss_failed": "no adapter"}], "mlx_lm.lora": good})


def test_a_peer_that_takes_too_long_is_killed() -> None:
    with pytest.raises(peer_environments.Failed, match="not done in 1 s"):
        peer_runs.run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    with pytest.raises(peer_environments.Failed, match="status 1: ValueError: x"):
        peer_runs.run([sys.executable, "-c", "raise ValueError('x')"], 60)


def test_mlx_lm_runs_here_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_environments.environment("mlx_lm.lora", "gpu") == sys.executable
    monkeypatch.setattr(peer_environments, "cache_folder", lambda: tmp_path)
    (tmp_path / "peers").mkdir()
    monkeypatch.setitem(peer_environments.INSTALL, "mlx-lm", ["mlx>=99"])
    monkeypatch.setattr(peer_environments, "_install", lambda command: (tmp_path / "peers/mlx-lm").mkdir(exist_ok=True))
    assert peer_environments.environment("mlx_lm.lora", "cpu") == str(tmp_path / "peers/mlx-lm/bin/python")


def test_versions_are_those_of_the_peers_python() -> None:
    assert peer_environments.versions(sys.executable)["torch"] == metadata.version("torch")


def test_rows_for_speed_have_the_lengths_that_are_wanted(tmp_path: Path) -> None:
    words = {
        name: [sum(len(turn["content"].split()) for turn in row["messages"]) for row in regret_data.speed_rows(name)]
        for name in regret_data.SPEED_SETS
    }
    assert 140 < sum(words["chat-like"]) / len(words["chat-like"]) < 160  # some 195 tokens with the template's
    assert max(words["chat-like"]) < 500
    assert min(words["mixed"]) < 10
    assert 700 < max(words["mixed"]) < 830
    file = regret_data.speed_file("mixed", tmp_path)
    assert file.read_bytes() == regret_data.speed_file("mixed", tmp_path).read_bytes()


def test_a_kernel_is_told_by_its_name() -> None:
    names = {
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<cutlass::bfloat16_t>": "attention",
        "nvjet_tst_128x256_64x4": "products",
        "sm90_xmma_gemm_bf16bf16": "products",
        "aten::addmm_": "products",
        "aten::mm": "products",
        "void at::native::vectorized_layer_norm_kernel<float>": "norms",
        "_rms_norm_grad": "norms",
        "_gated": "activations",
        "_rotated": "rotation",
        "void at::native::elementwise_kernel<128, 2>": "other",
    }
    assert {name: step_time.part_of(name) for name in names} == names

"""The scripts of benchmarks/ that run others: what fails is noted, and what comes after it is still measured."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import beside, mac, memory, nvidia, peer_runs, peers, random_model, stages
from benchmarks.one_step import job_of
from tests import backends

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
    monkeypatch.setattr(stages, "facts", dict)
    out, home = tmp_path / "report.json", str(Path.home())
    say = ["-c", "import os; print(os.environ['COLUMNS'], os.path.expanduser('~'))"]
    assert not stages.run_stages({"bad": [["-c", "raise SystemExit(3)"]], "good": [say]}, out, stages.hidden_paths())
    report = json.loads(out.read_text())["stages"]
    assert report["bad"][0]["status"] == 3
    assert report["good"][0]["output"] == "200 ~\n"
    assert home not in out.read_text()
    assert stages.run_stages({"good": [say]}, out, {})
    assert stages.run_stages({"late": [say]}, out, {}, minutes=0), "what the time does not allow has not failed"


def test_paths_are_replaced_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "facts", dict)
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
    assert job_of(case | {"device": "gpu"})[2].memory_budget == 850
    assert job_of(case)[2].memory_budget == 0


def test_random_models_are_written_within_their_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "cache_folder", lambda: tmp_path)
    found = nvidia.stages("gpu", 8, [])
    assert [*tmp_path.iterdir()] == []
    write, measure = found["torch: qwen3-4b"]
    assert write == ["-m", "benchmarks.random_model", "qwen3-4b"]
    assert measure[-1] == str(random_model.folder_of("qwen3-4b"))
    assert {"twintune-lean", "unsloth-lean"} <= {*measure}
    assert "nf4" in found["nf4: torch"][1]


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
    job = {name: 8 for name in ("steps", "batch", "rank", "learning_rate")} | {"precision": "fp32", "device": "cpu"}
    names = {"peer": "twintune-torch", "model": "m", "rows": "r", "quantization": "nf4", "output": str(tmp_path)}
    with pytest.raises(Ran):
        peer_runs.twintune(job | names)
    with pytest.raises(Ran):
        beside._speed("torch", 1)

"""What each export goes through, what its stages are estimated to take, and how that is measured."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import psutil
import pytest

from common.display import Display
from common.errors import UserError
from common.export import budget
from common.export.budget import (
    EXPORT_STEPS,
    Stage,
    StageMeter,
    check_disk,
    estimate_stages,
    needs_llama,
    warn_of_memory,
)
from common.models.model_folder import ModelFolder
from common.options import Options
from common.system import disk
from common.system.memory import PeakMemory
from tests import ROOT
from tests.unit.base_folder import write_base

PARAMETERS = 5 * 8 + 8 * 8 + 8 + 8 * 12 + 8
LARGEST = 8 * 12


def by_name(base: Path, export: str, quants: list[str], adapter_bytes: int = 0, held: int = 0) -> dict[str, Stage]:
    return {stage.name: stage for stage in estimate_stages(export, quants, ModelFolder(base), adapter_bytes, held)}


def test_every_export_has_its_way_and_is_offered() -> None:
    assert set(get_args(Options.model_fields["export"].annotation)) == set(EXPORT_STEPS)
    assert [name for name in EXPORT_STEPS if needs_llama(name)] == ["gguf", "lora-gguf"]


def test_what_each_stage_writes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    weights = (base / "model.safetensors").stat().st_size
    assert estimate_stages("none", ["Q4_K_M"], ModelFolder(base), 100) == []
    assert by_name(base, "fused", [])["fuse"].disk == weights + (base / "tokenizer.json").stat().st_size
    gguf = by_name(base, "gguf", ["Q4_K_M"])
    assert list(gguf) == ["fuse", "convert", "quantize"]
    assert gguf["convert"].disk == 2 * PARAMETERS
    assert PARAMETERS // 2 < gguf["quantize"].disk < 2 * PARAMETERS
    assert by_name(base, "gguf", ["Q4_K_M", "Q8_0"])["quantize"].disk == 2 * gguf["quantize"].disk
    assert by_name(base, "gguf", ["BF16"])["quantize"] == Stage("quantize", 0, 0)
    assert by_name(base, "lora-gguf", [], 500)["lora"].disk >= 500


def test_mlx_keeps_rows_whole_that_are_no_multiple_of_64(tmp_path: Path) -> None:
    weights = {"a.weight": np.zeros((6, 128), np.float32), "b.weight": np.zeros((6, 100), np.float32)}
    base = write_base(tmp_path / "base", weights=weights)
    tokenizer = (base / "tokenizer.json").stat().st_size
    assert by_name(base, "mlx", [])["mlx"].disk == 6 * (64 + 2 * 2 * 4) + 4 * 600 + tokenizer


def test_memory_goes_by_the_largest_tensor(tmp_path: Path) -> None:
    tall = {rows: {"a.weight": np.zeros((rows, 64), np.float32)} for rows in (64, 128)}
    small, large = (
        by_name(write_base(tmp_path / str(rows), weights=weights), "gguf", ["Q8_0"]) for rows, weights in tall.items()
    )
    grown = {name: large[name].memory - small[name].memory for name in small}
    assert grown["fuse"] == 0
    assert grown["convert"] == 8 * 64 * 64
    assert 4 * 64 * 64 < grown["quantize"] < 6 * 64 * 64
    base = tmp_path / "64"
    assert by_name(base, "fused", [], held=10**9)["fuse"].memory > 10**9


# --- checked beforehand


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), SimpleNamespace(free=free))[1])
    return asked


def test_too_little_disk_is_told_stage_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = disk_with(monkeypatch, 1_500_000_000)
    with pytest.raises(UserError) as caught:
        check_disk(tmp_path / "runs" / "new", [Stage("fuse", 0, 3_000_000_000), Stage("convert", 0, 1_000_000_000)])
    assert caught.value.what == (
        f"{tmp_path} has 1.5 GB free, and this run will write up to 4.0 GB (fuse 3.0, convert 1.0)."
    )
    assert caught.value.fix == (
        "Free some space, give --output on another disk, or stop earlier with --export fused or none."
    )
    assert asked == [tmp_path]


@pytest.mark.parametrize(
    ("full", "words"),
    [("run", "lora 1.0"), ("cache", "building llama.cpp 1.0"), ("tmp", "lora, temporary 2.0")],
)
def test_every_disk_that_is_written_to_is_looked_at(
    full: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run, the cache and the temporary files may be on three disks."""
    free = {tmp_path / name: 2 * 10**9 for name in ("run", "cache", "tmp")}
    for place in free:
        place.mkdir()
    monkeypatch.setattr(budget, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(budget, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(disk, "_device", list(free).index)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    stages = [Stage("lora", 0, 10**9, 2 * 10**9)]
    check_disk(tmp_path / "run", stages, 10**9)
    free[tmp_path / full] = 0
    with pytest.raises(UserError, match=rf"{full} has 0\.0 GB free, and this run .* \({words}\)"):
        check_disk(tmp_path / "run", stages, 10**9)


def test_enough_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 4_000_000_000)
    check_disk(tmp_path, [Stage("fuse", 0, 4_000_000_000)])


def test_too_little_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3_000_000_000))
    warn_of_memory([Stage("fuse", 10**8, 0), Stage("convert", 5_800_000_000, 0)], Display("plain"))
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("warning:") == 1
    assert "stage 'convert' after training needs about 5.80 GB, 3.00 GB are free now" in said


# --- measured

_HOLD = "import numpy, time; held = numpy.ones({bytes} // 8); time.sleep(0.5)"


@pytest.mark.slow
def test_memory_of_this_process_and_of_its_children_counts_whatever_was_held_before() -> None:
    before = np.ones(100 * 10**6 // 8)  # a peak that is over, which a child's ru_maxrss would take over
    del before
    with PeakMemory() as nothing:
        subprocess.run([sys.executable, "-c", _HOLD.format(bytes=8)], check=True)
    with PeakMemory() as child:
        subprocess.run([sys.executable, "-c", _HOLD.format(bytes=200 * 10**6)], check=True)
    assert nothing.peak < 80 * 10**6
    assert 190 * 10**6 < child.peak - nothing.peak < 230 * 10**6
    with PeakMemory() as own:
        held = np.ones(200 * 10**6 // 8)
        subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    assert own.peak > held.nbytes


def test_a_ledger_keeps_the_highest_memory_and_all_that_was_written(tmp_path: Path) -> None:
    seconds: dict[str, float] = {}
    meter = StageMeter([Stage("quantize", 5, 70)], seconds)
    for size in (30, 40):
        with meter.stage("quantize", tmp_path / str(size)):
            (tmp_path / str(size)).write_bytes(b"0" * size)
    found = meter.record()["quantize"]
    assert (found["disk"], found["predicted_disk"], found["predicted_memory"]) == (70, 70, 5)
    assert seconds["quantize"] > 0
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"0" * 9)
    again = StageMeter([Stage("fuse", 0, 0)], seconds)
    with again.stage("fuse", tmp_path / "folder"):
        pass
    assert again.record()["fuse"]["disk"] == 9


@pytest.mark.skipif(sys.platform != "linux", reason="there getrusage's peak survives exec")
def test_the_peak_is_not_that_of_the_program_that_started_this_one() -> None:
    child = "from common.system.memory import ResidentSet; print(ResidentSet().peak())"
    parent = (
        "import os, sys; held = bytearray(300_000_000); held[::4096] = bytes(len(held[::4096])); del held\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {child!r}])"
    )
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000_000

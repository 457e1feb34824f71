"""The wheel in an environment of its own, outside of the checkout: only here is seen what a package leaves out."""

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.tiny import write_model

SOURCES = (
    "cli.py",
    "common",
    "mlx_backend",
    "torch_backend",
    "configs",
    "examples",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def twintune(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the installed command in an empty folder. The wheel is built of a copy: nothing is left in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    source, empty = place / "source", place / "empty"
    source.mkdir()
    empty.mkdir()
    for name in SOURCES:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(place), str(source)], check=True)
    (wheel,) = place.glob("twintune-*.whl")
    venv.create(place / "env", with_pip=False)
    (place / "constraints.txt").write_text("torch==2.13.0\n")  # a bare torch fetches gigabytes for GPUs
    python = str(place / "env" / "bin" / "python")
    subprocess.run(
        [*pip, "--python", python, "install", "--constraint", str(place / "constraints.txt"), str(wheel)], check=True
    )

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [str(place / "env" / "bin" / "twintune"), *argv]
        return subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=600, check=False)

    return run


def test_help_and_doctor_answer(twintune: Run) -> None:
    done = twintune("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: twintune" in done.stdout
    done = twintune("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "train on torch" in done.stdout
    assert "gemma-3-1b-persona" in twintune("init", "--list").stdout
    assert twintune("--version").stdout.startswith("twintune 0.")


def test_three_steps_on_the_built_in_rows(twintune: Run, tmp_path: Path) -> None:
    """The preset and the example's rows are inside, and so are the chat templates."""
    model = write_model(tmp_path / "model")
    options = (
        "--model",
        str(model),
        "--steps",
        "3",
        "--device",
        "cpu",
        "--export",
        "fused",
        "--chat-template",
        "chatml",
    )
    done = twintune("train", *options, "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["data"]["train_rows"]) == ("complete", 400)
    assert (tmp_path / "run" / "fused" / "model.safetensors").is_file()
    done = twintune("train", *options, "--output", str(tmp_path / "run"))
    assert "twintune train --resume" in done.stderr

"""Each tracker's real library, offline, in an environment of its own: what it stored is read back by that library."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.option_fields import TRACKERS
from tests import ROOT
from tests.tiny import write_model, write_rows

OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "HF_HUB_OFFLINE": "1", "TWINTUNE_LEARN_MEMORY": "0"}
TEXT = ("Say x", " it is!")  # of the rows


@dataclass(frozen=True)
class Place:
    """An environment in which one tracker is installed, beside what these tests run in, and a folder to work in."""

    tracker: str
    folder: Path

    def __call__(self, *argv: str) -> str:
        python = str(self.folder / "env" / "bin" / "python")
        env = os.environ | OFFLINE | {"TRACKIO_DIR": str(self.folder / "trackio")}
        done = subprocess.run(
            [python, *argv], cwd=self.folder, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def train(self, *argv: str) -> str:
        return self(str(ROOT / "cli.py"), "train", *argv)

    def stored(self) -> dict[str, Any]:
        script = str(ROOT / "tests" / "long" / "stored.py")
        return json.loads(self(script, self.tracker, str(self.folder / "run")).splitlines()[-1])

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def texts_anywhere(self) -> list[Path]:
        """Files of the tracker that quote a row."""
        places = ("run/tensorboard", "wandb", "swanlog", "trackio", "mlruns", "mlflow.db")
        files = [f for name in places for f in [self.folder / name, *(self.folder / name).rglob("*")] if f.is_file()]
        assert files
        return [file for file in files if any(text.encode() in file.read_bytes() for text in (*TEXT, "rows.jsonl"))]


@pytest.fixture(scope="module", params=TRACKERS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    (packages / "base.pth").write_text(sysconfig.get_paths()["purelib"])  # torch is not installed again
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "env" / "bin" / "python")]
    subprocess.run([*pip, "install", *extras[request.param]], check=True)
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return Place(request.param, folder)


def by_step(lines: list[dict[str, Any]], name: str) -> list[list[float]]:
    return [[line["step"], pytest.approx(line[name], rel=1e-6)] for line in lines if name in line]


@pytest.mark.long
def test_a_tracker_stores_the_run_and_its_resumption_continues_it(place: Place) -> None:
    options = ("--model", "model", "--data", "rows.jsonl", "--output", "run", "--chat-template", "chatml")
    options += ("--backend", "torch", "--device", "cpu", "--precision", "fp32", "--export", "none", "--rank", "2")
    said = place.train(*options, "--steps", "4", "--eval-every", "2", "--track", place.tracker)
    assert f"{place.tracker}: " in said
    assert "is dropped" not in said
    stored = place.stored()
    assert stored["texts"] == []
    assert place.texts_anywhere() == []
    assert (str(stored["config"]["rank"]), str(stored["config"]["steps"])) == ("2", "4")
    assert "summary/best_valid_loss" in stored["figures"]

    asked = () if place.tracker == "tensorboard" else ("--track-artifacts", "adapter")
    said = place.train("--resume", "run", "--steps", "6", "--track-text", *asked)
    assert "is dropped" not in said
    stored, lines = place.stored(), place.metrics()
    for name, kept in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("eval/loss", "valid_loss")):
        assert stored["figures"][name] == by_step(lines, kept)
    assert len(stored["figures"]["train/loss"]) == 6
    assert len(stored["figures"]["memory/used_bytes"]) == 6
    assert any("Say x" in text for text in stored["texts"])
    if asked:
        weights = (place.folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
        digest = hashlib.sha256(weights).hexdigest()  # Trackio's name for the file
        assert any(name.endswith("adapter_model.safetensors") or name == digest for name in stored["files"])

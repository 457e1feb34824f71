"""`eval --suite` with lm-evaluation-harness itself: it wants other versions of libraries, so it gets its own place."""

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT
from tests.tiny import write_model

TASKS = Path(__file__).with_name("suite")
Eval = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Eval:
    """`judge(model, names, words)` runs `eval --suite`, in an environment with the harness over this one."""
    place = tmp_path_factory.mktemp("harness")
    venv.create(place / "env", with_pip=False)
    python = str(place / "env" / "bin" / "python")
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(str(Path(pytest.__file__).parent.parent) + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install"]
    subprocess.run([*pip, "lm_eval[hf,api]>=0.4.13,<0.5"], check=True)
    (place / "tasks").mkdir()
    for file in TASKS.glob("*.yaml"):
        text = file.read_text(encoding="utf-8").replace("ROWS", str(TASKS / "rows.jsonl"))
        (place / "tasks" / file.name).write_text(text, encoding="utf-8")

    def run(model: object, *words: str) -> subprocess.CompletedProcess[str]:
        command = [python, str(ROOT / "cli.py"), "eval", str(model), "--suite-tasks", str(place / "tasks"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)

    return run


def test_a_model_folder_does_own_tasks(judge: Eval, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    done = judge(model, "--suite", "harbor_choice", "harbor_words", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "suite" / "suite.json").read_text())["model"]
    assert found["harbor_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["harbor_words"]["exact_match,none"] == 0.0
    assert "harbor_words" in done.stdout


def test_what_fails_shows_the_harnesss_own_words(judge: Eval, tmp_path: Path) -> None:
    done = judge(write_model(tmp_path / "model"), "--suite", "harbor_nothing", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "harbor_nothing" in done.stderr


def test_a_gguf_is_not_asked_for_probabilities(judge: Eval, tmp_path: Path) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.touch()
    done = judge(file, "--suite", "harbor_choice", "harbor_words", "mmlu_anatomy", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "harbor_choice, mmlu_anatomy compares probabilities" in " ".join(done.stderr.split())

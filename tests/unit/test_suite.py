"""`eval --suite`: what lm-evaluation-harness is told, and what is made of its figures. It is played by a small program.

tests/long/test_suite.py runs the harness itself.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
from common.commands.eval import evaluate
from common.errors import UserError
from common.evaluation import suite as module
from common.evaluation.suite import _table
from tests.contexts import context
from tests.unit.test_chat_models import with_ggufs

PROGRAM = """
import json, sys
from pathlib import Path
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
print("Running generate_until requests:  50%|#####     | 1/2 [00:14<00:14, 14.81s/it]")
if config["tasks"] == ["broken"]:
    sys.exit("Tasks were not found: broken")
figures = {"acc,none": 0.5, "acc_stderr,none": 0.25, "acc,strict": 1, "acc_stderr,strict": "N/A", "alias": "x"}
out = Path(config["output_path"]) / "model"
out.mkdir()
(out / "results_2026.json").write_text(json.dumps({"results": dict.fromkeys(config["tasks"], figures)}))
Path(SEEN).open("a").write(json.dumps(config) + "\\n")
"""
TASKS = """
from enum import Enum
from types import SimpleNamespace as Entry
Kind = Enum("Kind", "TASK PY_TASK GROUP TAG")
def task(kind=Kind.TASK, **cfg):
    return Entry(kind=kind, cfg=cfg)
class TaskManager:
    def __init__(self, include_path=None):
        self.task_index = {
            "words": task(output_type="generate_until"), "plain": task(), "script": task(Kind.PY_TASK),
            "choice": task(output_type="multiple_choice"), "science": Entry(kind=Kind.TAG, cfg=None, tags={"choice"}),
            "all": task(Kind.GROUP, task=["words", {"group": "inner", "task": ["science"]}]),
            "mild": task(Kind.GROUP, task="words"),
        }
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A harness in the path of Python; returns what it was told so far."""
    place = tmp_path / "packages"
    for package in ("lm_eval", "aiohttp", "tenacity"):
        (place / package).mkdir(parents=True)
        (place / package / "__init__.py").touch()
    file = tmp_path / "seen.jsonl"
    (place / "lm_eval" / "__main__.py").write_text(PROGRAM.replace("SEEN", repr(str(file))))
    (place / "lm_eval" / "tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    yield lambda: [json.loads(line) for line in file.read_text().splitlines()]
    for name in ("lm_eval", "lm_eval.tasks"):
        sys.modules.pop(name, None)


def go(*argv: object) -> None:
    given: argparse.Namespace = cli.build_parser("eval").parse_args(["eval", *map(str, argv)])
    evaluate(given, context("plain"))


def test_a_model_folder_does_the_tasks(
    seen: Any, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    words = ("--suite", "words", "choice", "--suite-tasks", tmp_path / "mine", "--limit", 3, "--out", tmp_path / "out")
    go(tiny_llama, *words)
    (told,) = seen()
    assert Path(told["model_args"]["pretrained"]).name == tiny_llama.name
    assert Path(told["model_args"]["pretrained"]) != tiny_llama  # a copy without code
    assert (told["model_args"]["dtype"], told["model_args"]["use_safetensors"]) == ("float32", True)
    assert (told["model"], told["device"], told["apply_chat_template"]) == ("hf", "cpu", True)
    assert (told["tasks"], told["limit"], told["include_path"]) == (["words", "choice"], 3, str(tmp_path / "mine"))
    kept = json.loads((tmp_path / "out" / "suite" / "suite.json").read_text())
    assert kept["model"]["choice"]["acc,none"] == 0.5
    printed = capsys.readouterr().out
    assert "0.5000 ± 0.2500" in printed
    assert "acc (strict)" in printed
    assert "Running generate_until" in (tmp_path / "out" / "suite" / "model.log").read_text()


def test_a_failure_shows_what_the_harness_said_last(seen: Any, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"on model\. It said last:(.|\n)*Tasks were not found: broken") as caught:
        go(tiny_llama, "--suite", "broken", "--out", tmp_path / "out")
    assert str(tmp_path / "out" / "suite" / "model.log") in caught.value.fix


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        *((["choice"], "choice"), (["all"], "choice"), (["science", "script"], "choice, script")),
        *((["words"], None), (["plain", "mild"], None), (["none"], "has no task none")),
    ],
)
def test_a_gguf_is_asked_for_text_only(
    seen: Any, names: list[str], refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model-Q4_K_M.gguf"
    file.touch()

    class Served:
        port, shown = 1234, None

        def __init__(self, llama: Any, gguf: Path, options: Any) -> None:
            assert (gguf, options.context, options.slots) == (file, 4096, 1)

        def __enter__(self) -> "Served":
            return self

        def __exit__(self, *error: object) -> None:
            """Nothing was started."""

    monkeypatch.setattr(module, "Server", Served)
    monkeypatch.setattr(module, "llama_of", lambda *args: None)
    words = (file, "--suite", *names, "--out", tmp_path / "out")
    if refused:
        with pytest.raises(UserError, match=refused):
            go(*words)
        return
    go(*words)
    (told,) = seen()
    assert told["model"] == "local-chat-completions"
    assert told["model_args"]["base_url"] == "http://127.0.0.1:1234/v1/chat/completions"
    assert "OPENAI_API_KEY" not in os.environ


def test_a_run_is_judged_as_base_and_fused_folder(
    seen: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_ggufs(tmp_path / "run", "Q4_K_M")
    monkeypatch.setattr("common.commands.eval.base_of", lambda *args: argparse.Namespace(path=tiny_llama))
    with pytest.raises(UserError, match="an adapter alone is not a model"):
        go(run, "--suite", "words", "--with", "adapter")
    with pytest.raises(UserError, match="has no fused folder"):
        go(run, "--suite", "words", "--with", "fused")
    go(run, "--suite", "words", "--with", "base")
    assert len(seen()) == 1
    kept = run / "eval" / "suite" / "suite.json"
    assert [*json.loads(kept.read_text())] == ["base"]
    shutil.copytree(tiny_llama, run / "fused")
    go(run, "--suite", "plain")
    go(run / "fused", "--suite", "mild")
    assert [told["tasks"] for told in seen()[1:]] == [["plain"], ["plain"], ["mild"]]
    found = json.loads(kept.read_text())
    assert {name: [*tasks] for name, tasks in found.items()} == {"base": ["words", "plain"], "fused": ["plain", "mild"]}


def test_a_model_whose_template_is_missing_is_named(
    seen: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_ggufs(tmp_path / "run", "Q4_K_M")
    shutil.copytree(tiny_llama, run / "fused")
    plain = shutil.copytree(tiny_llama, tmp_path / "plain")
    tokenizer = json.loads((plain / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr("common.commands.eval.base_of", lambda *args: argparse.Namespace(path=plain))
    go(run, "--suite", "words")
    assert [told["apply_chat_template"] for told in seen()] == [False, True]
    assert "base has no chat template, and is asked in plain text" in capsys.readouterr().out


def test_what_cannot_be_combined(seen: Any, tiny_llama: Path, tmp_path: Path) -> None:
    for words in (["--with", "base"], ["--quant", "Q4_K_M"], ["--chat-template", "gemma"]):
        with pytest.raises(UserError, match=words[0]):
            go(tiny_llama, "--suite", "words", *words)


def test_the_proxy_of_the_user_is_kept_from_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert module._no_proxy() == {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    monkeypatch.setenv("no_proxy", "corp")
    assert module._no_proxy() == {"NO_PROXY": "corp,127.0.0.1", "no_proxy": "corp,127.0.0.1"}


def test_a_harness_that_is_missing_is_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed", lambda package: package != "lm_eval")
    with pytest.raises(UserError, match="needs lm-evaluation-harness, and lm_eval is not installed") as caught:
        go(tiny_llama, "--suite", "words")
    assert 'pip install "lm_eval[hf,api]"' in caught.value.fix


def test_a_folder_of_tasks_that_is_missing_is_named(seen: Any, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--suite-tasks .*: no such folder"):
        go(tiny_llama, "--suite", "words", "--suite-tasks", tmp_path / "nothing")


def test_neither_rows_nor_tasks() -> None:
    from common.commands.eval import run

    parser = cli.build_parser("eval")
    with pytest.raises(UserError, match="No data is given") as caught:
        run(parser.parse_args(["eval", "M"]), context())
    assert "--suite NAME" in caught.value.fix
    with pytest.raises(UserError, match="--data is not given"):
        run(parser.parse_args(["eval", "M", "--suite", "words", "--metric", "exact"]), context())


def test_figures_of_models_stand_side_by_side() -> None:
    figures = {
        "base": {"a": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
        "fused": {"a": {"acc,none": 1}, "b": {"f1,none": 2.0}},
    }
    heads, rows = _table(figures)
    assert heads == ["task", "metric", "base", "fused"]
    assert rows == [["a", "acc", "0.5000 ± 0.1000", "1.0000"], ["b", "f1", "-", "2.0000"]]

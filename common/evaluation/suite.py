"""Tasks of lm-evaluation-harness, where it is installed: in a process of its own, whose figures are read back."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.context import Context
from common.data.encode import load_tokenizer
from common.display import Display
from common.documents import read_json
from common.errors import UserError
from common.files import atomic_write
from common.inference.chat_models import Target, llama_of
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import LOOPBACK, Server, ServerOptions
from common.model_files import scrubbed
from common.system.hardware import installed
from common.system.process import fraction, run_logged

_BATCH = 8  # sequences at once, in PyTorch
_GENERATES = "generate_until"  # the only requests that a server without probabilities of a prompt can answer
_Figures = dict[str, dict[str, Any]]  # by task, as the harness writes them


@dataclass(frozen=True)
class Suite:
    """names: tasks or groups of tasks. tasks_from: folder of the user's own task files, which may name code. limit:
    rows of each task, all where None. folder: that gets the figures and the logs.
    """

    names: Sequence[str]
    tasks_from: Path | None
    limit: int | None
    folder: Path

    @property
    def file(self) -> Path:
        """The figures by model and task, those of earlier calls among them."""
        return self.folder / "suite.json"

    def check(self, gguf: bool) -> None:
        """Raises UserError where the harness, PyTorch or the folder is missing, or a GGUF cannot do a task."""
        needed = ("lm_eval", "torch", *(("aiohttp", "tenacity") if gguf else ()))
        if missing := [package for package in needed if not installed(package)]:
            raise UserError(
                f"--suite needs lm-evaluation-harness, and {', '.join(missing)} is not installed.",
                'pip install "lm_eval[hf,api]"',
            )
        if self.tasks_from is not None and not self.tasks_from.is_dir():
            raise UserError(f"--suite-tasks {self.tasks_from}: no such folder.", "Name the folder of your task files.")
        if gguf:
            _refuse_probabilities(self.names, self.tasks_from)


def run_suite(
    suite: Suite, folders: dict[str, Path], ggufs: Sequence[Target], slots: int, length: int, context: Context
) -> None:
    """Have every model do the tasks; show the figures side by side, and keep those of each as soon as they are there.

    folders: model folders by name. ggufs: served by llama.cpp, `slots` answers of `length` tokens at once.
    """
    llama = [llama_of(target, context) for target in ggufs]  # before hours of work
    templates = {name: load_tokenizer(folder).chat_template is not None for name, folder in folders.items()}
    if len({*templates.values()}) > 1:
        plain = ", ".join(name for name, there in templates.items() if not there)
        context.display.warn(f"{plain} has no chat template, and is asked in plain text: compare with care")
    suite.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, _Figures] = {}
    for name, folder in folders.items():
        with scrubbed(folder, weights=True) as clean:
            found[name] = _figures(suite, name, _in_pytorch(clean, templates[name], context), {}, context.display)
    for target, programs in zip(ggufs, llama, strict=True):
        with _served(target, programs, slots, length) as (settings, key):
            name, env = target.path.stem.removeprefix("model-"), {"OPENAI_API_KEY": key, **_no_proxy()}
            found[name] = _figures(suite, name, settings, env, context.display)
    context.display.table("lm-evaluation-harness, each figure with its standard error", *_table(found))
    context.display.say(f"Figures: {suite.file}")


def _in_pytorch(folder: Path, chats: bool, context: Context) -> dict[str, Any]:
    """How the harness loads a model folder. chats: whether to ask it in its own template."""
    device = context.backends("torch").choose_device("auto").value
    dtype = "float32" if device == "cpu" else "auto"
    return {
        "model": "hf",
        "model_args": {"pretrained": str(folder), "dtype": dtype, "use_safetensors": True},
        "device": device,
        "batch_size": _BATCH,
        "apply_chat_template": chats,
    }


@contextmanager
def _served(target: Target, llama: LlamaCpp, slots: int, length: int) -> Iterator[tuple[dict[str, Any], str]]:
    """`(how the harness asks the server of a GGUF, the server's key)`."""
    options = ServerOptions(length, slots)
    with Server(llama, target.path, options) as server:
        url = f"http://{LOOPBACK}:{server.port}/v1/chat/completions"
        model = {"model": target.path.stem, "base_url": url, "num_concurrent": slots}
        yield {"model": "local-chat-completions", "model_args": model, "apply_chat_template": True}, str(options.key)


def _no_proxy() -> dict[str, str]:
    """The user's proxy has no part in a request to this machine."""
    names = ("NO_PROXY", "no_proxy")
    known = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return dict.fromkeys(names, f"{known},{LOOPBACK}".lstrip(","))


def _figures(suite: Suite, name: str, settings: dict[str, Any], env: dict[str, str], display: Display) -> _Figures:
    """Of one model, kept. Raises UserError with the harness's last lines where it fails."""
    log = suite.folder / f"{name}.log"
    with tempfile.TemporaryDirectory() as folder, display.stage(f"lm-evaluation-harness: {name}") as progress:
        config = settings | {"tasks": list(suite.names), "limit": suite.limit, "output_path": folder}
        if suite.tasks_from is not None:
            config["include_path"] = str(suite.tasks_from.resolve())
        file = Path(folder) / "harness.json"  # JSON is YAML
        file.write_text(json.dumps(config), encoding="utf-8")

        def show(line: str) -> None:
            what, colon, _ = line.strip().partition(": ")
            if colon and (share := fraction(line)) is not None:
                progress(share, what)

        command = [sys.executable, "-P", "-m", "lm_eval", "run", "--config", str(file)]
        status, tail = run_logged(command, log, show, env=dict(os.environ) | env)
        results = sorted(Path(folder).rglob("results_*.json"))
        if status or not results:
            raise UserError(
                f"lm-evaluation-harness failed on {name}. It said last:\n{tail}",
                f"All that it said: {log}. Its tasks: {sys.executable} -m lm_eval ls tasks",
            )
        found: _Figures = read_json(results[-1], f"Look at {log}.", allow_nan=True)["results"]
    known = read_json(suite.file, f"Remove {suite.file}.", allow_nan=True) if suite.file.exists() else {}
    with atomic_write(suite.file) as temporary:
        temporary.write_text(json.dumps(known | {name: known.get(name, {}) | found}, indent=2), encoding="utf-8")
    return found


def _table(found: dict[str, _Figures]) -> tuple[list[str], list[list[str]]]:
    """`(column heads, rows)`: a row for each task and metric, a column for each model."""
    keys = dict.fromkeys(
        (task, key)
        for figures in found.values()
        for task, of_task in figures.items()
        for key, value in of_task.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    )
    rows = [
        [task, _metric(key), *(_cell(figures.get(task, {}), key) for figures in found.values())] for task, key in keys
    ]
    return ["task", "metric", *found], rows


def _metric(key: str) -> str:
    """`acc` of `acc,none`; another filter than none is named."""
    metric, _, filtered = key.partition(",")
    return metric if filtered == "none" else f"{metric} ({filtered})"


def _cell(of_task: dict[str, Any], key: str) -> str:
    value, error = of_task.get(key), of_task.get(key.replace(",", "_stderr,", 1))
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")


def _refuse_probabilities(names: Sequence[str], tasks_from: Path | None) -> None:
    """Raises UserError for tasks that compare probabilities of given answers, as multiple choice does.

    llama-server gives none of a prompt's, so that their score would be chance.
    """
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    index = TaskManager(include_path=str(tasks_from) if tasks_from else None).task_index
    if unknown := [name for name in names if name not in index]:
        raise UserError(f"--suite: lm-evaluation-harness has no task {', '.join(unknown)}.", "Look: lm_eval ls tasks")
    tasks = [task for name in names for task in _tasks_of(name, index)]
    refused = [task for task in dict.fromkeys(tasks) if _output_type(index[task]) != _GENERATES]
    if refused:
        raise UserError(
            f"--suite: {_some(refused)} compares probabilities of given answers, which llama.cpp's server does not "
            "tell: a GGUF would score chance.",
            "Judge the fused folder (--with fused), or give tasks that generate text.",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tasks_of(name: str, index: dict[str, Any]) -> list[str]:
    """The tasks of a group or a tag, and of the groups in it; of a task itself alone."""
    entry = index.get(name)
    if entry is None:
        return []
    if entry.kind.name == "GROUP":
        return [task for member in _members((entry.cfg or {}).get("task")) for task in _tasks_of(member, index)]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return [name]


def _members(given: Any) -> list[str]:
    """The names in a group's `task`: one name, or a list of names and of groups written out."""
    if isinstance(given, list):
        return [name for one in given for name in _members(one)]
    return _members(given.get("task")) if isinstance(given, dict) else [str(given)]


def _output_type(entry: Any) -> str:
    """What a task asks of a model. A task in Python does not say."""
    return "unknown" if entry.kind.name == "PY_TASK" else str(entry.cfg.get("output_type", _GENERATES))

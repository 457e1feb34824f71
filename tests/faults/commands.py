"""Twintune's commands in processes that are forked from this one, where every package is loaded already.

So a command begins within milliseconds, and a kill can hit any moment of it.
"""

import hashlib
import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import cli
from common.llama_cpp.install import LlamaCpp
from tests import ROOT
from tests.tiny import chat, write_convertible

SECONDS = 900  # for any one command, on a machine that is busy with others
STEPS, SAVE_EVERY, EVAL_EVERY = 30, 4, 6
COLORS = ("red", "green", "blue", "black")


@dataclass
class Command:
    """A command under way. Its output goes to `log`."""

    words: list[str]
    log: Path
    pid: int

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status, negative for a signal. Raises TimeoutError, and kills it, where it does not end."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"{self.words[0]} did not end within {seconds:.0f} seconds")
            time.sleep(0.005)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


PACKAGES = ("torch", "peft", "gguf", "torch_backend.backend", "mlx_backend.backend", "mlx_lm")


def preload() -> None:
    """Import what the commands import. No MLX array is made here: its threads would not survive a fork."""
    for name in (*PACKAGES, *(f"common.commands.{command.replace('-', '_')}" for command in cli.COMMANDS)):
        importlib.import_module(name)


def start(words: list[str], log: Path, stdin: str = "") -> Command:
    """Begin `python cli.py WORDS`, with `stdin` as its whole input."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become(words, log, stdin)
    return Command(words, log, pid)


def _become(words: list[str], log: Path, stdin: str) -> None:
    status = 70
    try:
        reading, writing = os.pipe()
        os.write(writing, stdin.encode())
        os.close(writing)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number, descriptor in enumerate((reading, output, output)):
            os.dup2(descriptor, number)
        sys.argv = [str(ROOT / "cli.py"), *words]
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def write_inputs(folder: Path, llama: LlamaCpp) -> None:
    """`folder/model`, which can become a GGUF, and `folder/data`."""
    write_convertible(folder / "model", llama.converter.parent / "models" / "ggml-vocab-gpt-2.gguf")
    (folder / "data").mkdir()
    rows = [chat(f"Paint {n} boats.", f"I paint {n} boats {COLORS[n % 4]}.") for n in range(24)]
    for name, part in (("train", rows), ("valid", rows[:5])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def train_words(folder: Path, run: Path, backend: str, export: str) -> list[str]:
    """`train` over the inputs in `folder`, with frequent validations and checkpoints."""
    given = {
        "model": folder / "model",
        "data": folder / "data",
        "output": run,
        "backend": backend,
        "device": "cpu",
        "precision": "fp32",
        "rank": 4,
        "steps": STEPS,
        "learning-rate": 1e-2,
        "save-every": SAVE_EVERY,
        "eval-every": EVAL_EVERY,
        "export": export,
    }
    return ["train", *(str(word) for name, value in given.items() for word in (f"--{name}", value))]


def result(run: Path) -> dict[str, Any]:
    """What has to be the same to the bit, however often the run was stopped: losses, weights, and what is on record."""
    record = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "valid_loss", "learning_rate", "grad_norm", "tokens", "label_tokens")
    found: dict[str, Any] = {
        "metrics": [{name: line[name] for name in kept if name in line} for line in lines],
        "record": {name: record.get(name) for name in ("status", "steps", "tokens", "best_step", "exported_step")},
        "verdict": (record.get("verify") or {}).get("verdict"),
    }
    for folder in ("adapter", "adapter-mlx", "fused", "gguf"):
        for path in sorted((run / folder).glob("*")):
            if path.suffix in (".safetensors", ".gguf"):
                found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of what differs between two results."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def leftovers(run: Path) -> list[str]:
    """Names in the run folder that are no part of a run."""
    names = (".twintune-", ".verify-", ".vision-", ".partial-")
    found = [path for path in run.rglob("*") if path.name.startswith(names) or path.suffix in (".tmp", ".part")]
    return sorted(str(path.relative_to(run)) for path in found)


def servers(folder: Path) -> list[psutil.Process]:
    """The llama-servers that run on a file in `folder`."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if "llama-server" in (process.info["name"] or "") and any(str(folder) in word for word in words):
            found.append(process)
    return found

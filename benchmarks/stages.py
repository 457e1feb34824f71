"""Commands of this repository run one after another on a machine to be measured; their output in one JSON file."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peer_runs import ROOT
from common.llama_cpp.install import which
from common.system.cache import cache_folder
from common.system.environment import environment
from common.system.hardware import nvidia_gpus
from common.system.memory import swap_used

_KEPT = 20_000  # characters of a command's output, from its end
Stages = dict[str, list[list[str]]]  # by name, the arguments of Python in each of its commands


def facts() -> dict[str, Any]:
    """The machine and what is installed on it."""
    gpus = [gpu.name for gpu in nvidia_gpus()]
    return environment() | {"release": platform.platform(), "gpus": gpus, "commit": _commit()}


def _commit() -> str:
    """Of the checkout; empty where it is none."""
    head = ROOT / ".git" / "HEAD"
    if not head.is_file():
        return ""
    name = head.read_text(encoding="utf-8").strip().removeprefix("ref: ")
    branch = ROOT / ".git" / name
    return branch.read_text(encoding="utf-8").strip() if branch.is_file() else name


def hidden_paths() -> dict[str, str]:
    """Paths that name a user or say how a machine is arranged, and what is written for them."""
    cmake = {path: "cmake" for path in [which("cmake")] if path}
    return {str(cache_folder()): "CACHE", str(ROOT): "CHECKOUT", str(Path.home()): "~"} | cmake


def run_stages(stages: Stages, out: Path, hidden: dict[str, str], minutes: float = float("inf")) -> bool:
    """Run every command, and write what is known to `out` after each stage. Returns whether none failed.

    One that fails does not stop the others; one that the time does not allow has not failed. hidden: words that must
    not stand in the report, and what is written for them. minutes: no command begins after them, and none runs on.
    """
    good = True
    ends = time.monotonic() + 60 * minutes
    report: dict[str, Any] = {"machine": facts(), "stages": {}}
    for name, commands in stages.items():
        print(f"{name} ...", flush=True)
        done = [_run(command, ends - time.monotonic()) for command in commands]
        for result in done:
            print(f"    {'FAILED' if result['status'] else 'ok'} in {result['seconds']} s", flush=True)
            good = good and (result["status"] == 0 or isinstance(result["status"], str))
        report["stages"][name] = done
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        for word in sorted(hidden, key=len, reverse=True):  # the cache is within the home folder
            text = text.replace(word, hidden[word])
        out.write_text(text, encoding="utf-8")
    print(f"Written: {out}")
    return good


def _run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """What a command printed, its status, its seconds, and how much swap grew meanwhile."""
    started, swap = time.monotonic(), swap_used()
    result: dict[str, Any] = {"command": " ".join(["python", *arguments])}
    if seconds <= 0:
        return result | {"status": "not begun: the time was over", "seconds": 0.0}
    code, output = _within(seconds, arguments)
    return result | {
        "status": "ended: the time was over" if code is None else code,
        "seconds": round(time.monotonic() - started, 1),
        "swap_growth": swap_used() - swap,
        "output": output[-_KEPT:],
    }


def _within(seconds: float, arguments: list[str]) -> tuple[int | None, str]:
    """`(status, what was printed)`; no status where the time was over: all that the command has started is killed."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"COLUMNS": "200"},  # or tables would break paths in two, which could not be hidden
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=None if seconds == float("inf") else seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]

"""Commands of this repository run one after another on a machine to be measured; their output in one JSON file."""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

from benchmarks import commit
from benchmarks.peer_runs import ROOT
from common.files import atomic_write
from common.llama_cpp.install import which
from common.system.cache import cache_folder
from common.system.environment import environment
from common.system.hardware import nvidia_gpus
from common.system.memory import swap_used

_KEPT = 20_000  # characters of a command's output, from its end
_OVER = "the time was over"
Stages = dict[str, list[list[str]]]  # by name, the arguments of Python in each of its commands


def facts(given_commit: str) -> dict[str, Any]:
    """The day, the commit, the machine and what is installed on it."""
    gpus = [gpu.name for gpu in nvidia_gpus()]
    driver = {"driver": str(pynvml.nvmlSystemGetDriverVersion())} if gpus else {}
    return commit.known(given_commit) | environment() | {"release": platform.platform(), "gpus": gpus} | driver


def hidden_paths() -> dict[str, str]:
    """Paths that name a user or say how a machine is arranged, and what is written for them."""
    cmake = {path: "cmake" for path in [which("cmake")] if path}
    return {str(cache_folder()): "CACHE", str(ROOT): "CHECKOUT", str(Path.home()): "~"} | cmake


def run_stages(
    stages: Stages,
    out: Path,
    hidden: dict[str, str],
    given_commit: str = "",
    minutes: float = float("inf"),
    limits: Mapping[str, float] | None = None,
) -> bool:
    """Run every command, and write what is known to `out` after each. Returns whether none failed.

    What an earlier call has done, as `out` says, on this machine at this commit, is left out; stages that it began come
    after the others. One that fails does not stop the others; one that the time does not allow has not failed. A result
    names the call that measured it. hidden: words that must not stand in the report, and what is written for them.
    minutes: of this call. limits: the seconds of a stage, by its name. It begins where half of them are left, and fails
    where they are over.
    """
    report = _earlier(out)
    report["calls"].append(facts(given_commit))
    found, good = report["stages"], True
    ends = time.monotonic() + 60 * minutes
    with _ended_by_sigterm():
        for name in sorted(stages, key=lambda name: name in found):
            done = [_done(command, found.get(name, []), report["calls"], hidden) for command in stages[name]]
            if all(done):
                print(f"{name}: done before", flush=True)
                continue
            left = ends - time.monotonic()
            limit = (limits or {}).get(name, left)
            if left <= 0 or left < limit / 2:
                print(f"{name}: not begun: {_OVER}", flush=True)
                continue
            print(f"{name} ...", flush=True)
            late = _OVER if left <= limit else f"its {limit:.0f} s were over"
            stage_ends = time.monotonic() + min(left, limit)
            for arguments in stages[name]:  # all of them: one may read what another writes
                result = _run(arguments, stage_ends - time.monotonic(), late)
                good = good and result["status"] in (0, f"ended: {_OVER}", f"not begun: {_OVER}")
                print(f"    {result['status'] or 'ok'} in {result['seconds']} s", flush=True)
                found.setdefault(name, []).append(result | {"call": len(report["calls"])})
                _write(report, out, hidden)
    _write(report, out, hidden)
    print(f"Written: {out}")
    return good


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the context the signal raises SystemExit, so that the command under way is killed too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _earlier(out: Path) -> dict[str, Any]:
    """What earlier calls have written to `out`; nothing of a version that ran all stages in one call."""
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return report if "calls" in report else {"calls": [], "stages": {}}


def _done(
    command: list[str], results: list[dict[str, Any]], calls: list[dict[str, Any]], hidden: dict[str, str]
) -> bool:
    """Whether a result, of a call as the last one is, has all figures of the command."""
    same = [{name: call.get(name) for name in ("commit", "gpus", "processor")} for call in calls]
    wanted = _hide(" ".join(["python", *command]), hidden)
    return any(
        result["command"] == wanted and same[result["call"] - 1] == same[-1] and _complete(result) for result in results
    )


def _complete(result: dict[str, Any]) -> bool:
    """benchmarks.peers: figures of every peer, whatever they are. Else status 0."""
    runs = result.get("figures", {}).get("runs") if isinstance(result.get("figures"), dict) else None
    if runs is None:
        return bool(result["status"] == 0)
    return bool(runs) and all(own and "failed" not in own[-1] and "loss" in own[0] for own in runs.values())


def _hide(text: str, hidden: dict[str, str]) -> str:
    for word in sorted(hidden, key=len, reverse=True):  # the cache is within the home folder
        text = text.replace(word, hidden[word])
    return text


def _write(report: dict[str, Any], out: Path, hidden: dict[str, str]) -> None:
    with atomic_write(out.absolute()) as temporary:
        temporary.write_text(_hide(json.dumps(report, indent=2, ensure_ascii=False) + "\n", hidden), encoding="utf-8")


def _run(arguments: list[str], seconds: float, late: str) -> dict[str, Any]:
    """What a command printed and wrote by --json, its status, its seconds, and how much swap grew meanwhile."""
    started, swap = time.monotonic(), swap_used()
    result: dict[str, Any] = {"command": " ".join(["python", *arguments])}
    if seconds <= 0:
        return result | {"status": f"not begun: {late}", "seconds": 0.0}
    code, output = _within(seconds, arguments)
    figures = Path(arguments[arguments.index("--json") + 1]) if "--json" in arguments else None
    if figures and figures.exists():
        result["figures"] = json.loads(figures.read_text(encoding="utf-8"))
    return result | {
        "status": f"ended: {late}" if code is None else code,
        "seconds": round(time.monotonic() - started, 1),
        "swap_growth": swap_used() - swap,
        "output": output[-_KEPT:],
    }


def _within(seconds: float, arguments: list[str]) -> tuple[int | None, str]:
    """`(status, what was printed)`; no status where the time was over: all that the command has started is killed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},  # or tables would break paths in two, which could not be hidden
            start_new_session=True,
        )
        try:
            code = process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed.seek(0)
        return code, printed.read()

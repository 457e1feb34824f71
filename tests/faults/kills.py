"""SIGKILL at random moments of a training and its export; then a resume, whose result has to be the uninterrupted one.

    python -m tests.faults.kills --kills 100

prints a line a kill and a table of where they hit. Exits with status 1 where a resume failed, or its result differs.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and OpenBLAS: the result's bits depend on it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from common.llama_cpp.build import ensure
from common.run_record import Run
from tests.faults.commands import (
    Command,
    differences,
    leftovers,
    preload,
    result,
    servers,
    start,
    train_words,
    write_inputs,
)

# Seconds of run.json that are spent before the command's training, in it, and after; in this order.
STAGES = ("prepare", "load", "train", "evaluate", "save", "fuse", "convert", "quantize", "try", "verify")
AGAIN = 0.25  # the share of resumes that are killed too


@dataclass
class Report:
    """What happened, by backend and by where a kill hit."""

    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    new_starts: int = 0
    ended_before: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: its result, and the seconds at which its stages began and ended."""

    result: dict[str, Any]
    spans: list[tuple[float, float]]


def uninterrupted(folder: Path, backend: str, export: str) -> Reference:
    run = folder / f"reference-{backend}"
    began = time.monotonic()
    command = start(train_words(folder, run, backend, export), folder / f"reference-{backend}.log")
    status, total = command.wait(), time.monotonic() - began
    if status:
        raise SystemExit(f"the uninterrupted run failed with {status}:\n{command.output[-3000:]}")
    seconds, at, spans = Run(run).record.stage_seconds, 0.0, []
    for name in STAGES:
        if name in seconds:
            spans.append((at, at + seconds[name]))
            at += seconds[name]
    return Reference(result(run), [*spans, (at, max(total, at + 0.1))])


def where(run: Path) -> str:
    """Which part of its work the killed command had reached, by what is on disk."""
    if not (run / "run.json").exists():
        return "prepare"
    record = Run(run).record
    if record.status != "complete":
        saved = any((run / "checkpoints").glob("step-*/COMPLETE"))
        return "train, evaluate, save" if saved else "train, before a checkpoint"
    if record.verify:
        return "the end"
    if record.export.gguf:
        return "verify"
    return "convert" if record.export.fused else "fuse"


def kill(command: Command, seconds: float) -> bool:
    """SIGKILL after `seconds`; whether the command was still running then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, _ = os.waitpid(command.pid, os.WNOHANG)
        if pid:
            return False
        time.sleep(0.001)
    os.kill(command.pid, signal.SIGKILL)
    os.waitpid(command.pid, 0)
    return True


def recover(words: list[str], run: Path, log: Path) -> Command:
    """The command that a user gives after a kill: resume where there is a run, else the same once more."""
    begun = (run / "run.json").exists()
    return start(["train", "--resume", str(run)] if begun else words, log)


def trial(folder: Path, backend: str, export: str, reference: Reference, number: int, draw: random.Random) -> Report:
    """One run that is killed once or more, resumed, and compared."""
    report, run, log = Report(), folder / f"run-{backend}-{number}", folder / f"run-{backend}-{number}.log"
    words = train_words(folder, run, backend, export)
    command = start(words, log)
    while True:
        begin, end = reference.spans[(number + sum(report.hits.values())) % len(reference.spans)]
        if not kill(command, draw.uniform(begin, end)):
            report.ended_before += 1
            break
        hit = where(run)
        report.hits[backend, hit] += 1
        report.new_starts += hit == "prepare"
        time.sleep(0.5)  # what it started may end
        left = servers(run)
        report.faults += [f"{run}: killed in {hit}, its llama-server runs on ({process.pid})" for process in left]
        for process in left:
            process.kill()
        command = recover(words, run, log)
        if draw.random() >= AGAIN:
            break
    if report.hits:
        report.faults += _faults(command, run, reference)
    if not report.faults:
        shutil.rmtree(run)
    return report


def _faults(command: Command, run: Path, reference: Reference) -> list[str]:
    try:
        status = command.wait()
    except ChildProcessError:  # it had ended before the kill that was meant for it
        status = 0
    except TimeoutError as error:
        return [f"{run}: {error}"]
    if status:
        return [f"{run}: the resume exits with status {status}: {command.output[-500:]}"]
    found = [f"{run}: differs in {name}" for name in differences(result(run), reference.result)]
    return found + [f"{run}: left behind: {name}" for name in leftovers(run)]


def kills(count: int, backends: list[str], export: str, seed: int, folder: Path) -> Report:
    """`count` kills, shared out to the backends; a line is printed for each trial."""
    write_inputs(folder, ensure(None, lambda done, text: None))
    preload()
    draw, whole = random.Random(seed), Report()
    for share, backend in enumerate(backends):
        reference = uninterrupted(folder, backend, export)
        wanted, number = (count + share) // len(backends), 0
        while sum(n for (of, _), n in whole.hits.items() if of == backend) < wanted:
            one = trial(folder, backend, export, reference, number, draw)
            number += 1
            whole.hits += one.hits
            whole.new_starts += one.new_starts
            whole.ended_before += one.ended_before
            whole.faults += one.faults
            hits = ", ".join(where for _, where in one.hits.elements()) or "nothing: it had ended"
            print(f"{backend} {number}: killed in {hits}: {'; '.join(one.faults) or 'the same result'}", flush=True)
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many, over both backends (default: 100)")
    parser.add_argument("--backend", choices=("torch", "mlx"), help="only one")
    parser.add_argument("--export", default="gguf", choices=("none", "fused", "gguf"), help="how far (default: gguf)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="twintune-kills-"))
    backends = [args.backend] if args.backend else ["torch", "mlx"]
    report = kills(args.kills, backends, args.export, args.seed, folder)
    print(f"\n{'killed in':30}" + "".join(f"{name:>8}" for name in backends))
    for place in sorted({place for _, place in report.hits}):
        print(f"{place:30}" + "".join(f"{report.hits[name, place]:8}" for name in backends))
    print(f"{sum(report.hits.values())} kills, {report.new_starts} new starts, {len(report.faults)} faults")
    if report.faults:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

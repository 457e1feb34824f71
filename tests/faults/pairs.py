"""Two commands on one run at once: each ends well or says that the other holds the run, which stays intact.

    python -m tests.faults.pairs

runs every pair of the commands that take a run, on a finished and on a stopped training. Exits with 1 at a fault.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and OpenBLAS: the result's bits depend on it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from common.llama_cpp.build import ensure
from common.training import checkpoint
from tests.faults.commands import (
    Command,
    differences,
    leftovers,
    preload,
    result,
    start,
    train_words,
    write_inputs,
)

COMMANDS = ("resume", "train", "fuse", "verify", "push", "chat", "generate", "serve", "compare", "adapter")
BUSY = "by another process"
# What a command may say of a run that is not trained to its end, or whose export is being made.
UNFINISHED = (
    "has not finished training",
    "has no GGUF",
    "has no fused",
    "holds no",
    "finish",
    "exists",
    "is not there",
    "holds another run",
)


@dataclass(frozen=True)
class Place:
    """The inputs and a finished and a stopped run of them; how the finished one's result looks."""

    folder: Path
    finished: Path
    stopped: Path
    result: dict[str, Any]


def words_of(name: str, run: Path, place: Place, number: int) -> list[str]:
    """The command line of the command called `name`. number: 0 or 1, so that two of a kind write different files."""
    prompts = place.folder / "data" / "valid.jsonl"
    out = run.parent / f"answers-{number}.jsonl"
    lines: dict[str, list[object]] = {
        "resume": ["train", "--resume", run],
        "train": list(train_words(place.folder, run, "torch", "gguf")),
        "fuse": ["fuse", run],
        "verify": ["verify", run],
        "push": ["push", run, "me/model", "--dry-run"],
        "chat": ["chat", run],
        "generate": ["generate", run, "--prompts", prompts, "--out", out, "--max-tokens", 4, "--context", 512],
        "serve": ["serve", run, "--port", 18400 + number],
        "compare": ["compare", run, place.finished],
        "adapter": ["adapter", "inspect", run],
    }
    return [str(word) for word in lines[name]]


def prepare(folder: Path) -> Place:
    """Train once to the end, and once until a signal stops it halfway."""
    write_inputs(folder, ensure(None, lambda done, text: None))
    preload()
    finished, stopped = folder / "finished", folder / "stopped"
    for run in (finished, stopped):
        command = start(train_words(folder, run, "torch", "gguf"), folder / f"{run.name}.log")
        if run is stopped:
            while checkpoint.latest_step(run) is None:
                time.sleep(0.002)
            os.kill(command.pid, signal.SIGTERM)
        if command.wait() != (130 if run is stopped else 0):
            raise SystemExit(f"the training to begin with failed:\n{command.output[-3000:]}")
    return Place(folder, finished, stopped, result(finished))


def ended(command: Command) -> str:
    """What was wrong with how `command` ended; nothing where it ended well, or refused with one clear error."""
    try:
        if command.words[0] == "serve":
            time.sleep(1)
            os.kill(command.pid, signal.SIGTERM)
        status = command.wait()
    except TimeoutError as error:
        return str(error)
    text, serves = command.output, command.words[0] == "serve"
    if "Traceback" in text or "this is a bug" in text:
        return f"{command.words[0]}: {text[-600:]}"
    if status == 0 or (serves and status in (130, -signal.SIGTERM)):
        return ""
    said = text[text.rfind("error: ") :]
    if status == 1 and said.startswith("error: ") and "fix:" in said and any(w in said for w in (BUSY, *UNFINISHED)):
        return ""
    return f"{command.words[0]} exits with status {status}: {text[-600:]}"


def pair(place: Place, names: tuple[str, str], from_stopped: bool) -> list[str]:
    """Run two commands at once on a copy of a run, then bring it to its end; what went wrong."""
    home = Path(tempfile.mkdtemp(dir=place.folder))
    run = home / "run"
    shutil.copytree(place.stopped if from_stopped else place.finished, run)
    both = [
        start(words_of(name, run, place, number), home / f"{number}-{name}.log", "hello\n")
        for number, name in enumerate(names)
    ]
    both.sort(key=lambda command: command.words[0] == "serve")  # a server ends when the other has
    faults = [ended(command) for command in both]
    if from_stopped:
        end = start(["train", "--resume", str(run)], home / "end.log")
        faults += [f"the resume afterwards: {end.output[-600:]}"] if end.wait() else []
    faults += [f"differs in {name}" for name in differences(result(run), place.result)]
    faults += [f"left behind: {name}" for name in leftovers(run)]
    found = [f"{' + '.join(names)}: {fault}" for fault in faults if fault]
    if not found:
        shutil.rmtree(home)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.pairs", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=int, metavar="N", help="a sample of N pairs of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="twintune-pairs-"))
    place, faults, done = prepare(folder), [], 0
    for from_stopped in (False, True):
        pairs = list(itertools.combinations_with_replacement(COMMANDS, 2))
        if args.only:
            pairs = random.Random(args.seed).sample(pairs, args.only)
        for names in pairs:
            found = pair(place, names, from_stopped)
            print(f"{'stopped' if from_stopped else 'finished'}: {' + '.join(names)}: {found or 'fine'}", flush=True)
            faults += found
            done += 1
    print(f"\n{done} pairs, {len(faults)} faults")
    if faults:
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every write of a run refused once, one at a time; then a resume, whose result has to be the undisturbed one.

    python -m tests.faults.writes --all

counts the writes of a training with its export (and of `fuse` to a GGUF), and refuses each in a run of its own: ENOSPC,
then EIO. What may follow is one error that names the file and a way on, or success with a warning. Nothing half-written
may stand under a final name, and the command that the error names, or the same command, must give the result of the
undisturbed run to the bit. Refusals happen below Python, in a preloaded library (refuse.c). Exits with status 1 where
any of this does not hold.
"""

import argparse
import ctypes
import errno
import hashlib
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and OpenBLAS: the result's bits depend on it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.gguf_file import read_tensors
from common.models.adapter_files import read_mlx, read_peft, read_trained
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import read_header
from common.run_record import Run
from common.system import disk
from common.training import checkpoint
from tests.faults.commands import differences, leftovers, preload, result, start, write_inputs
from tests.tiny import write_model, write_rows

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
_CONTROL = "REFUSE_CONTROL"


class Control(ctypes.Structure):
    """As in refuse.c."""

    _fields_ = [
        ("target", ctypes.c_int),
        ("error", ctypes.c_int),
        ("count", ctypes.c_int),
        ("call", ctypes.c_char * 28),
        ("path", ctypes.c_char * 1024),
        ("folder", ctypes.c_char * 1024),
    ]


@dataclass(frozen=True)
class Job:
    """A command on a run. words: without the run. base: a finished run that it starts from, copied each time."""

    name: str
    words: list[str]
    base: Path | None = None

    def command(self, run: Path) -> list[str]:
        return ["train", *self.words, "--output", str(run)] if self.base is None else ["fuse", str(run), *self.words]


@dataclass
class Report:
    """What became of the refused writes of one job."""

    writes: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # survived, clean error
    calls: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@contextmanager
def library() -> Iterator[tuple[Path, Path]]:
    """The compiled refuse.c, and the file that controls it."""
    with tempfile.TemporaryDirectory(prefix="twintune-refuse-") as folder:
        built, control = Path(folder) / "refuse.so", Path(folder) / "control"
        source = Path(__file__).with_name("refuse.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(source), "-ldl"], check=True)
        control.write_bytes(bytes(ctypes.sizeof(Control)))
        yield built, control


def train_words(inputs: Path, backend: str, steps: int, export: str) -> list[str]:
    given = {
        "model": inputs / "model",
        "data": inputs / "data",
        "backend": backend,
        "device": "cpu",
        "precision": "fp32",
        "rank": 2,
        "batch-size": 4,
        "steps": steps,
        "save-every": 2,
        "eval-every": 2,
        "keep-checkpoints": 1,
        "export": export,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def write_small(folder: Path) -> None:
    """`folder/model`, which is tiny, and `folder/data`."""
    write_model(folder / "model")
    (folder / "model" / "LICENSE").write_text("MIT License\n")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", 16)
    write_rows(folder / "data" / "valid.jsonl", 4)


class Runner:
    def __init__(self, folder: Path, control: Control) -> None:
        self.folder, self.control = folder, control

    def run(self, words: list[str], run: Path, target: int = 0, error: int = 0) -> tuple[int, str]:
        """Exit status and output of the command, whose write number `target` in the run is refused; 0: none."""
        self.control.target, self.control.error, self.control.count = target, error, 0
        self.control.call, self.control.path, self.control.folder = b"", b"", str(run).encode()
        log = self.folder / "log"
        command = start(words, log)
        status = command.wait()
        self.control.folder = b""
        return status, command.output

    def finished(self, export: str) -> Job:
        """A `fuse` of a run that is trained. llama.cpp takes a vocabulary of its own only, in a larger model."""
        inputs, run = self.folder, self.folder / f"trained-{export}"
        if export == "gguf":
            inputs = self.folder / "convertible"
            inputs.mkdir()
            write_inputs(inputs, ensure(None, lambda done, text: None))
        status, output = self.run(["train", *train_words(inputs, "torch", 1, "none"), "--output", str(run)], run)
        if status:
            raise SystemExit(f"the training failed:\n{output[-3000:]}")
        return Job(f"fuse, {export}", ["--export", export, *(["--no-verify"] if export == "gguf" else [])], run)

    def job(self, job: Job, share: float, kinds: list[str], seed: int) -> Report:
        """Refuse the job's writes, or a share of them, once each."""
        report, sound = Report(), self.folder / re.sub(r"\W+", "-", f"sound-{job.name}")
        self._prepare(job, sound)
        status, output = self.run(job.command(sound), sound)
        if status:
            raise SystemExit(f"the undisturbed run failed:\n{output[-3000:]}")
        wanted, report.writes = outcome(sound), self.control.count
        if not report.writes:
            raise SystemExit(f"{job.name}: no write was seen, so nothing can be refused: is the library preloaded?")
        cases = [(number, kind) for number in range(1, report.writes + 1) for kind in kinds]
        chosen = random.Random(seed).sample(cases, max(1, round(share * len(cases)))) if share < 1 else cases
        for number, kind in sorted(chosen):
            self._refuse(job, number, kind, wanted, report)
        return report

    def _prepare(self, job: Job, run: Path) -> None:
        shutil.rmtree(run, ignore_errors=True)
        if job.base is not None:
            shutil.copytree(job.base, run)

    def _refuse(self, job: Job, number: int, kind: str, wanted: dict[str, Any], report: Report) -> None:
        run = self.folder / "refused"
        self._prepare(job, run)
        status, output = self.run(job.command(run), run, number, ERRORS[kind])
        call, path = self.control.call.decode(), self.control.path.decode()
        report.calls[call] += 1
        place = f"{job.name}: {kind} for {call} {Path(path).relative_to(run)} (write {number})" if path else job.name
        report.ends["survived" if status == 0 else "clean error"] += 1
        found = [*said(status, output, run), *half_written(run), *leftovers(run)]
        if not call:
            found.append(f"write {number} never came")
        if status:
            again = self._again(job, run)
            code, output = self.run(again, run)
            if code:
                found.append(f"{' '.join(again[:3])} afterwards fails: {output[-400:]}")
        if not found:
            found = [f"differs in {name}" for name in differences(outcome(run), wanted)]
        report.faults += [f"{place}: {fault}" for fault in found]
        print(
            f"{place}: {'; '.join(found) or ('survived' if status == 0 else 'one error, and all is well')}", flush=True
        )

    def _again(self, job: Job, run: Path) -> list[str]:
        """The command that goes on after an error."""
        if job.base is not None or not (run / "run.json").exists():
            return job.command(run)
        complete = Run(run).record.status == "complete"
        return ["fuse", str(run)] if complete else ["train", "--resume", str(run)]


def outcome(run: Path) -> dict[str, Any]:
    """What has to be the same to the bit."""
    weights = (run / "mlx").glob("*.safetensors")
    return result(run) | {f"mlx/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}


def said(status: int, output: str, run: Path) -> list[str]:
    """What is wrong with the end of a command: its status, its words."""
    quoted = "log, " in output and "ends with:" in output  # a tool's own last lines
    if ("Traceback" in output and not quoted) or "this is a bug" in output:
        return [f"a bug: {output[-800:]}"]
    if status == 0:
        return []
    errors = re.findall(r"^error: (.*?)^fix: ", output, re.MULTILINE | re.DOTALL)
    if status != 1 or len(errors) != 1:
        return [f"status {status}, {len(errors)} errors: {output[-800:]}"]
    return [] if str(run) in "".join(errors[0].split()) else [f"no file is named: {errors[0]}"]


def half_written(run: Path) -> list[str]:
    """Files under their final names that are not complete."""
    if not run.exists():
        return []
    found = []
    readers = {
        "run.json": lambda path: Run(run).record,
        "recipe.yaml": lambda path: Run(run).recipe,
        "plan.yaml": lambda path: Run(run).plan,
        "adapter": read_peft,
        "adapter-mlx": read_mlx,
        "fused": lambda path: [read_header(shard) for shard in ModelFolder(path).shards],
        "mlx": lambda path: [read_header(shard) for shard in ModelFolder(path).shards],
    }
    for name, read in readers.items():
        if (run / name).exists() and (fault := _fault(read, run / name)):
            found.append(f"{name} is half-written: {fault}")
    for path in [*run.glob("checkpoints/step-*"), *run.glob("gguf/*.gguf")]:
        read = read_tensors if path.suffix == ".gguf" else _read_checkpoint
        if fault := _fault(read, path):
            found.append(f"{path.relative_to(run)} is half-written: {fault}")
    return found


def _fault(read: Any, path: Path) -> str:
    try:
        read(path)
    except (UserError, OSError, ValueError, KeyError) as error:
        return str(error)
    return ""


def _read_checkpoint(folder: Path) -> None:
    if not checkpoint._complete(folder):
        raise ValueError("its hashes")
    read_trained(folder)


def show(reports: dict[str, Report]) -> int:
    """Print what docs/reliability.md quotes; the exit status."""
    for name, report in reports.items():
        ends = ", ".join(f"{count} {end}" for end, count in report.ends.items())
        calls = ", ".join(f"{call} {count}" for call, count in report.calls.most_common())
        print(f"{name}: {report.writes} writes; refused {report.ends.total()}: {ends}; {len(report.faults)} faults")
        print(f"    refused calls: {calls}")
    faults = [fault for report in reports.values() for fault in report.faults]
    print(*faults, sep="\n")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--all", action="store_true", help="refuse every write")
    amount.add_argument("--share", type=float, help="refuse this share of the writes, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=ERRORS)
    parser.add_argument("--backends", nargs="*", default=["torch", "mlx"], choices=["torch", "mlx"], help="of `train`")
    parser.add_argument("--exports", nargs="*", default=["mlx", "gguf"], choices=["mlx", "gguf"], help="of `fuse`")
    args = parser.parse_args()
    if _CONTROL not in os.environ:
        with library() as (built, control):
            env = os.environ | {"LD_PRELOAD": str(built), _CONTROL: str(control)}
            return subprocess.run([sys.executable, "-m", "tests.faults.writes", *sys.argv[1:]], env=env).returncode
    preload()
    disk._AGAIN = 0.0  # seconds until a write is tried again
    with open(os.environ[_CONTROL], "r+b") as file, tempfile.TemporaryDirectory(prefix="twintune-writes-") as name:
        folder = Path(name)
        runner = Runner(folder, Control.from_buffer(mmap.mmap(file.fileno(), 0)))
        write_small(folder)
        made = [Job(f"train, {b}", train_words(folder, b, 4, "fused")) for b in args.backends]
        made += [runner.finished(export) for export in args.exports]
        share = 1.0 if args.all else args.share
        reports = {job.name: runner.job(job, share, args.errors, args.seed) for job in made}
    return show(reports)


if __name__ == "__main__":
    sys.exit(main())

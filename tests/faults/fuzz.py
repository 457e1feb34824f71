"""Every reader over damaged and hostile files: each case must end well or in a UserError, within its time.

    python -m tests.faults.fuzz --cases 300000 [--only NAME] [--seed N]

prints a table: cases, accepted, refused by a UserError, and any other end by exception and our last line. The first
case of each such kind is kept in a folder. Anything but a UserError is a fault of ours, a TypeError as much as a crash.
"""

import argparse
import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from common.errors import UserError
from tests import ROOT
from tests.faults import fuzz_data, fuzz_models, fuzz_runs
from tests.faults.reader import Case, Reader

# By name: how many of 1,000 cases, and what makes the reader in an empty folder.
READERS: dict[str, tuple[int, Callable[[Path], Reader]]] = {
    "rows": (240, fuzz_data.rows),
    "large rows": (20, fuzz_data.large_rows),
    "prompts": (80, fuzz_data.prompts),
    "yaml": (100, fuzz_data.yaml_configs),
    "flags": (100, fuzz_data.flags),
    "prepare": (10, fuzz_data.preparation),
    "adapters": (120, fuzz_models.adapters),
    "headers": (80, fuzz_models.headers),
    "models": (60, fuzz_models.models),
    "loading": (5, fuzz_models.loading),
    "served": (30, fuzz_models.served),
    "tokenizers": (25, fuzz_models.tokenizers),
    "sentencepieces": (10, fuzz_models.sentencepieces),
    "gguf models": (5, fuzz_models.gguf_models),
    "gguf loras": (40, fuzz_models.gguf_loras),
    "gguf reports": (25, fuzz_models.gguf_reports),
    "runs": (30, fuzz_runs.records),
    "checkpoints": (20, fuzz_runs.checkpoints),
}
_BATCH = 3_000  # cases of one process: hypothesis keeps what it has generated
_MEMORY = 12 << 30  # address space of a process, so that a size that is believed fails


class Hang(BaseException):
    """A case took longer than its reader's limit."""


@dataclass
class Outcome:
    """How the cases of a reader ended. other: by kind, each with its count and where the first case is kept."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    other: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        self.cases += other.cases
        self.accepted += other.accepted
        self.refused += other.refused
        for kind, (count, where) in other.other.items():
            known, first = self.other.get(kind, (0, where))
            self.other[kind] = (known + count, first)


def fuzz(name: str, count: int, number: int, out: Path) -> Outcome:
    """`count` cases of a reader, the same for the same `number`. What fails is kept in folders of `out`."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="twintune-fuzz-", dir=_memory_folder()) as temporary, _alone(temporary):
        reader = READERS[name][1](Path(temporary))

        @seed(number)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(reader.cases)
        def one(case: Case) -> None:
            if outcome.cases < count:
                _run_case(reader, case, outcome, out / name.replace(" ", "-"))

        one()
    return outcome


def _run_case(reader: Reader, case: Case, outcome: Outcome, out: Path) -> None:
    outcome.cases += 1
    reader.write(case)
    try:
        with _limit(reader.limit):
            reader.read(case)
        outcome.accepted += 1
    except UserError:
        outcome.refused += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind = _kind(error)
        count, where = outcome.other.get(kind, (0, str(out / str(len(outcome.other)))))
        outcome.other[kind] = (count + 1, where)
        if not count:
            _keep(case, Path(where))
    finally:
        reader.write({name: reader.good.get(name) for name in case})


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises Hang after so many seconds; where the time is spent outside of Python, the process ends a little later."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    faulthandler.dump_traceback_later(3 * seconds + 60, exit=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again: an exception within a collection of garbage is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def _kind(error: BaseException) -> str:
    """The exception's class and the last line of ours that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and not f.filename.startswith(str(ROOT / "tests"))]
    ours = [f for f in ours if ".venv" not in f.filename]
    last = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "none of ours"
    return f"{type(error).__name__} at {last}"


def _keep(case: Case, where: Path) -> None:
    for name, content in case.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content or b"")
    (where / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """A cache and a working folder of its own, and no network."""
    before, environment = Path.cwd(), dict(os.environ)
    os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "HF_HOME": f"{folder}/hub", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "COLUMNS": "100"}
    (Path(folder) / "here").mkdir()
    os.chdir(Path(folder) / "here")
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= environment


def _batch(name: str, count: int, number: int, out: Path) -> Outcome:
    """`fuzz` in a process of its own; where that dies, one case counts, and the others of the batch are left out."""
    command = [sys.executable, "-m", "tests.faults.fuzz", "--only", name, "--cases", str(count)]
    command += ["--seed", str(number), "--out", str(out), "--here"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        log = out / f"{name.replace(' ', '-')}-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        return Outcome(1, other={f"the process ended with {done.returncode}": (1, str(log))})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Outcome(**found | {"other": {kind: tuple(value) for kind, value in found["other"].items()}})


def table(outcomes: dict[str, Outcome]) -> str:
    total = Outcome()
    lines = ["| reader | cases | accepted | UserError | other |", "| --- | ---: | ---: | ---: | ---: |"]
    for outcome in outcomes.values():
        total.add(outcome)
    for name, outcome in (*outcomes.items(), ("all", total)):
        other = sum(count for count, _ in outcome.other.values())
        lines.append(f"| {name} | {outcome.cases:,} | {outcome.accepted:,} | {outcome.refused:,} | {other:,} |")
    kinds = Counter({kind: count for kind, (count, _) in total.other.items()})
    lines += [f"{count:>7,}  {kind}  ({total.other[kind][1]})" for kind, count in kinds.most_common()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz")
    parser.add_argument("--cases", type=int, default=10_000, help="of all readers together, or of the one named")
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "twintune-fuzz")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        print(json.dumps(vars(fuzz(args.only[0], args.cases, args.seed, args.out))))
        return
    outcomes = {}
    shares = sum(READERS[name][0] for name in args.only)
    for name in args.only:
        left = round(args.cases * READERS[name][0] / shares)
        outcomes[name], number, started = Outcome(), args.seed, time.monotonic()
        while left > 0:
            outcomes[name].add(_batch(name, min(left, _BATCH), number, args.out))
            left, number = left - _BATCH, number + 1
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(table(outcomes))
    sys.exit(any(outcome.other for outcome in outcomes.values()))


if __name__ == "__main__":
    main()

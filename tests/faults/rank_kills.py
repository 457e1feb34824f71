"""SIGKILL of a rank at random steps of a training on several; it has to end by name, and to continue on any number.

    python -m tests.faults.rank_kills --kills 20

Each training runs on two or three ranks of one backend, and one of them is killed at a random step. It is resumed on
one to three ranks. Prints a line a kill; exits with status 1 where a run took longer than a minute to end, did not say
which rank was lost, or where a curve differs from that of one device.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from common.training import checkpoint
from tests.e2e.test_ranks import ranks
from tests.faults.worker_kills import APART, STEPS, losses, on_one_device, train

BACKENDS = ("torch", "mlx")
WITHIN = 60  # seconds, for a run whose rank was killed to end


def one(number: int, inputs: Path, references: dict[str, list[float]]) -> bool:
    """Whether the run of this number ended as it should, and continued to the same curve."""
    draw, run = random.Random(number), inputs / f"run-{number}"
    backend, size = BACKENDS[number % 2], draw.randint(2, 3)
    victim, kill_at = draw.randrange(size), draw.randrange(1, STEPS - 5)
    training = train(run, inputs, backend, "--devices", str(size), "--save-every", "7")
    while training.poll() is None and len(losses(run)) < kill_at:
        time.sleep(0.02)
    pids, killed = ranks(training), time.monotonic()
    if len(pids) < size:
        raise SystemExit(f"{number}: it ended before step {kill_at}: {training.communicate()[0]}")
    os.kill(pids[victim], signal.SIGKILL)
    text, _ = training.communicate()
    seconds = time.monotonic() - killed
    named = f"rank {victim}" in text and f"--resume {run}" in text
    step, again = checkpoint.latest_step(run) or 0, draw.randint(1, 3)
    resumed = train(run, inputs, backend, "--devices", str(again), resume=True)
    said, _ = resumed.communicate()
    if resumed.returncode:
        raise SystemExit(said)
    apart = max(abs(a - b) for a, b in zip(references[backend], losses(run), strict=True))
    print(
        f"{number}: rank {victim} of {size} ({backend}) killed after step {kill_at}; {'' if named else 'NOT '}named, "
        f"ended in {seconds:.1f} s; continued from step {step} on {again}; apart {apart:.1e}",
        flush=True,
    )
    return training.returncode != 0 and named and seconds < WITHIN and apart <= APART


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.rank_kills")
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        references = on_one_device(inputs)
        good = [one(number, inputs, references) for number in range(given.kills)]
    print(f"{sum(good)} of {len(good)} kills survived")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()

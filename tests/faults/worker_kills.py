"""SIGKILL of a worker at random steps of a training that it helps; the curve has to stay the one of a single computer.

    python -m tests.faults.worker_kills --kills 20

Each training is helped by a worker of the other backend, which is killed at a random step and started again, and by a
second one that joins at a random step. Prints a line a training; exits with status 1 where a curve differs.
"""

import argparse
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.run_record import Run
from common.training.transport import SECRET
from tests import ROOT
from tests.tiny import write_model, write_rows

STEPS, APART = 50, 1e-5
OTHER = {"torch": "mlx", "mlx": "torch"}
ENV = os.environ | {SECRET: secrets.token_hex(16), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENV |= {"TWINTUNE_LEARN_MEMORY": "0"}


def worker(backend: str, port: int) -> subprocess.Popen:
    words = ["worker", "--backend", backend, "--device", "cpu", "--port", str(port)]
    return subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *words], env=ENV, stdout=subprocess.DEVNULL)


def train(folder: Path, inputs: Path, backend: str, *more: str, resume: bool = False) -> subprocess.Popen:
    """A training into the folder, or the rest of it. What it prints is in stdout."""
    words = ["--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), "--output", str(folder)]
    words += ["--precision", "fp32", "--export", "none", "--rank", "4", "--batch-size", "24", "--steps", str(STEPS)]
    words += ["--valid-share", "0", "--learning-rate", "1e-3"]
    words = ["train", *(["--resume", str(folder)] if resume else words), "--backend", backend, "--device", "cpu", *more]
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


def on_one_device(inputs: Path) -> dict[str, list[float]]:
    """Write the model and the rows; each backend's step losses without anybody's help."""
    write_model(inputs / "model")
    write_rows(inputs / "rows.jsonl", 300, longest=300)
    for backend in OTHER:
        train(inputs / backend, inputs, backend).communicate()
    return {backend: losses(inputs / backend) for backend in OTHER}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def one(number: int, inputs: Path, folder: Path, expected: list[float], backend: str) -> tuple[int, int, float]:
    """`(times that a worker left, times that one joined during the training, largest difference of a step's loss)`"""
    ports, draw = (free_port(), free_port()), random.Random(number)
    kill_at, join_at = draw.randrange(1, 25), draw.randrange(1, 25)
    helpers = [worker(OTHER[backend], ports[0])]
    time.sleep(6)
    run = folder / f"run-{number}"
    training = train(run, inputs, backend, "--with", *(f"127.0.0.1:{port}" for port in ports))
    while training.poll() is None:
        done = len(losses(run))
        if kill_at and done >= kill_at:
            helpers[0].send_signal(signal.SIGKILL)
            helpers.append(worker(OTHER[backend], ports[0]))
            kill_at = 0
        if join_at and done >= join_at:
            helpers.append(worker(OTHER[backend], ports[1]))
            join_at = 0
        time.sleep(0.02)
    text = training.stdout.read() if training.stdout else ""
    for helper in helpers:
        helper.kill()
        helper.wait()
    if training.returncode:
        raise SystemExit(text)
    left = text.count(f"127.0.0.1:{ports[0]} does not help")
    joined = text.count(" helps: ") - 1
    apart = max(abs(a - b) for a, b in zip(expected, losses(run), strict=True))
    print(f"{number}: {backend}; left {left}, joined {joined}; apart {apart:.1e}; {shares(run)}", flush=True)
    return left, joined, apart


def shares(run: Path) -> str:
    found = Run(run).record.shares
    return ", ".join(f"{share['what']} {share['steps']} steps" for share in found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.worker_kills")
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        references = on_one_device(inputs)
        found = [
            one(number, inputs, inputs, references[backend], backend)
            for number in range(given.kills)
            for backend in [("torch", "mlx")[number % 2]]
        ]
    left, joined, apart = sum(f[0] for f in found), sum(f[1] for f in found), max(f[2] for f in found)
    print(f"workers left {left} times and joined {joined} times; step losses at most {apart:.1e} apart")
    sys.exit(apart > APART)


if __name__ == "__main__":
    main()

"""Whether the number of ranks changes a training's curve: step losses beside those of one device, in float32.

    python -m benchmarks.ranks                       # SmolLM2-135M, 50 steps, torch over gloo and MLX over its ring
    python -m benchmarks.ranks --only "torch full" --ways "2 ranks" "2 ranks, sharded"

Prints the largest difference of a step's loss to one device, for one device that cuts its micro-batches otherwise, for
several ranks, and for a worker of the other backend; and the peak memory of the fullest rank beside its estimate.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks.peer_runs import ROOT
from common.options import EXAMPLE
from common.run_record import Run
from common.training.transport import SECRET

PORT = "7471"
os.environ.setdefault(SECRET, secrets.token_hex(16))
os.environ["TWINTUNE_LEARN_MEMORY"] = "0"  # estimates are those of the formula

CASES = {
    "torch lora": ("torch", "lora", (2, 4)),
    "torch full": ("torch", "full", (2, 4)),
    "mlx lora": ("mlx", "lora", (2, 3)),
    "mlx full": ("mlx", "full", (2, 3)),
}
RATES = {"lora": "2e-4", "full": "2e-5"}  # usual ones
OTHER = {"torch": "mlx", "mlx": "torch"}


def ways_of(backend: str, method: str, ranks: tuple[int, ...]) -> dict[str, list[str]]:
    """By a name, what is given to train beside what one device is given."""
    ways = {
        "one device, a row at a time": ["--micro-batch-tokens", "1"],
        "one device, two rows at a time": ["--micro-batch-tokens", "100"],
    }
    ways |= {f"{count} ranks": ["--devices", str(count)] for count in ranks}
    if backend == "torch":
        ways["2 ranks, sharded"] = ["--devices", "2", "--shard"]
    if method == "lora":
        ways["a worker of the other backend"] = ["--with", f"127.0.0.1:{PORT}"]
    return ways


@contextmanager
def worker(backend: str) -> Iterator[None]:
    words = [sys.executable, str(ROOT / "cli.py"), "worker", "--backend", backend, "--device", "cpu", "--port", PORT]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def train(folder: Path, backend: str, method: str, steps: int, *more: str) -> Run:
    words = ["--backend", backend, "--method", method, "--steps", str(steps), "--device", "cpu", "--precision", "fp32"]
    words += ["--data", str(EXAMPLE / "train.jsonl"), "--valid-share", "0", "--batch-size", "4", "--export", "none"]
    words += ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--recipe", "fixed", "--learning-rate", RATES[method]]
    words += ["--quiet", "--output", str(folder), *more]
    subprocess.run([sys.executable, str(ROOT / "cli.py"), "train", *words], check=True, cwd=ROOT)
    return Run(folder)


def losses(run: Run) -> list[float]:
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def measure(name: str, steps: int, wanted: list[str] | None) -> None:
    backend, method, ranks = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        one = train(Path(folder) / "one", backend, method, steps)
        expected = losses(one)
        for number, (way, more) in enumerate(ways_of(backend, method, ranks).items()):
            if wanted and way not in wanted:
                continue
            with worker(OTHER[backend]) if "--with" in more else nullcontext():
                run = train(Path(folder) / str(number), backend, method, steps, *more)
            apart = max(abs(a - b) for a, b in zip(expected, losses(run), strict=True))
            record = run.record
            if record.recipe_hash != one.record.recipe_hash:
                raise SystemExit(f"{way}: another recipe")
            peak, estimate = record.peak_memory_bytes or 0, record.predicted_peak_bytes or 0
            print(
                f"| {name} | {way} | {apart:.1e} | {peak / 1e9:.2f} GB ({100 * (estimate / peak - 1):+.0f} %) | "
                f"{record.tokens_per_second:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks")
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--ways", nargs="+", help="only these, by the names that are printed")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    print("| training | on | step losses apart from one device | peak (estimate) | tokens/s |\n|" + " --- |" * 5)
    for name in given.only:
        measure(name, given.steps, given.ways)


if __name__ == "__main__":
    main()

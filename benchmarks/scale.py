"""What several devices are worth: measured with a rank a core, and computed for many GPUs and Macs.

    python -m benchmarks.scale                    # measure 1 and 2 ranks of one thread each, then print the model
    python -m benchmarks.scale --computed         # the model alone

The model of a step: what a micro-batch costs in any case, and the tokens of the rank that has most, by its speed; the
gradients' all-reduce, and the rows that rank 0 tells. Lengths of rows are the built-in example's, times --length.
Speeds and links are stated with each table.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from benchmarks.peer_runs import ROOT
from common.data.batching import deal, step_rows
from common.options import EXAMPLE
from common.run_record import Run

_MICRO_BATCH = 8192  # tokens
_TOLD = 12  # bytes that rank 0 sends a token: its id, its target and its weight
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GRADIENTS = 4_884_480 * 4  # bytes, of SmolLM2's adapter of rank 16


@dataclass(frozen=True)
class Link:
    """Between ranks. bandwidth: bytes a second, one way. latency: seconds of one message."""

    name: str
    bandwidth: float
    latency: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds: around a ring each part goes twice; in a tree a message goes up and down."""
        if ranks == 1:
            return 0.0
        ring = 2 * (ranks - 1) / ranks * size / self.bandwidth + 2 * (ranks - 1) * self.latency
        tree = 2 * math.ceil(math.log2(ranks)) * (size / self.bandwidth + self.latency)
        return min(ring, tree)

    def broadcast(self, size: float, ranks: int) -> float:
        return 0.0 if ranks == 1 else math.ceil(math.log2(ranks)) * (size / self.bandwidth + self.latency)


@dataclass(frozen=True)
class Machine:
    """speed: tokens a second of one device in training. gradients: bytes of all that is trained, in float32.

    start: seconds that a micro-batch takes besides.
    """

    name: str
    start: float
    speed: float
    gradients: float
    link: Link


# 4B: 4,492 to 4,879 tokens/s on an H200 (docs/benchmarks.md, "On an NVIDIA GPU"); an adapter of rank 16 on all layers.
_LORA_4B, _FULL_4B = 33e6 * 4, 4.02e9 * 4
_LORA_1B, _FULL_1B = 13e6 * 4, 1.0e9 * 4
_LAUNCHES = 0.034  # seconds: a step of SmolLM2 on an H200, which does little else
_NVLINK = Link("400 Gb/s InfiniBand a GPU", 40e9, 15e-6)
_THUNDERBOLT = Link("Thunderbolt 5, ring", 6e9, 50e-6)
_ETHERNET = Link("1 Gb/s Ethernet", 0.11e9, 300e-6)
MACHINES = {
    "GPUs": (
        (8, 64, 512),
        [
            Machine("4B LoRA", _LAUNCHES, 4_700, _LORA_4B, _NVLINK),
            Machine("4B full", _LAUNCHES, 4_700, _FULL_4B, _NVLINK),
        ],
    ),
    "Macs": (
        (2, 4, 8),
        [
            Machine("1B LoRA", _LAUNCHES, 600, _LORA_1B, _THUNDERBOLT),
            Machine("1B LoRA", _LAUNCHES, 600, _LORA_1B, _ETHERNET),
            Machine("1B full", _LAUNCHES, 600, _FULL_1B, _THUNDERBOLT),
            Machine("1B full", _LAUNCHES, 600, _FULL_1B, _ETHERNET),
        ],
    ),
}


def lengths(factor: float) -> np.ndarray:
    """Tokens of the example's rows, about: three characters each."""
    rows = (EXAMPLE / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([max(8, round(factor * len(row) / 3)) for row in rows])


def loads(sizes: np.ndarray, batch: int, ranks: int, steps: int = 20) -> tuple[float, float]:
    """`(tokens of the rank that has most, tokens of a step)`, the mean of some steps."""
    most, every = 0, 0
    for step in range(1, steps + 1):
        chosen = np.sort(np.resize(sizes, max(len(sizes), batch))[step_rows(max(len(sizes), batch), batch, 0, step)])
        most += max(int(chosen[dealt].sum()) for dealt in deal(chosen.tolist(), ranks))
        every += int(chosen.sum())
    return most / steps, every / steps


def seconds(machine: Machine, sizes: np.ndarray, batch: int, ranks: int) -> tuple[float, float]:
    """`(seconds of a step, its tokens)`"""
    most, tokens = loads(sizes, batch, ranks)
    link = machine.link
    exchanged = link.all_reduce(machine.gradients, ranks) + link.broadcast(tokens * _TOLD, ranks)
    return machine.start * math.ceil(most / _MICRO_BATCH) + most / machine.speed + exchanged, tokens


def computed(factor: float) -> None:
    sizes = lengths(factor)
    print(f"\nComputed, not measured. Rows of {sizes.mean():.0f} tokens on the mean; 100 %: as fast as alone.\n")
    print("| devices | model, link | 8 rows a device: efficiency | 128 rows a step: efficiency | times one device |")
    print("|" + " --- |" * 5)
    for name, (counts, machines) in MACHINES.items():
        for machine in machines:
            for count in counts:
                cells = []
                for batch in (8 * count, 128):
                    time_one, tokens_one = seconds(machine, sizes, batch, 1)
                    time_all, tokens = seconds(machine, sizes, batch, count)
                    speedup = tokens / time_all / (tokens_one / time_one)
                    cells.append(f"{speedup / count:.0%}")
                print(f"| {count} {name} | {machine.name}, {machine.link.name} | {' | '.join(cells)} | {speedup:.1f} |")


def measured(steps: int) -> None:
    """One rank on one core, two ranks on two, and what the model says of these.

    Two cores share caches and memory, as two machines do not, and half of the rows take more than half of the time. So
    two trainings that know nothing of each other are measured too, each on half as many rows: the model goes by them.
    """
    link = _loopback()
    with tempfile.TemporaryDirectory() as folder:
        one, tokens = _train(Path(folder) / "1", 1, steps, rows=8)
        with ThreadPoolExecutor(2) as both:
            beside = max(both.map(lambda name: _train(Path(folder) / name, 1, steps, rows=4)[0], ("left", "right")))
        two, _ = _train(Path(folder) / "2", 2, steps, rows=8)
    sizes = lengths(1)
    most, every = loads(sizes, 8, 2)
    told = link.all_reduce(_GRADIENTS, 2) + link.broadcast(tokens * _TOLD, 2)
    expected = beside * most / (every / 2) + told
    print(f"all-reduce of {_GRADIENTS / 1e6:.1f} MB between two processes: {link.all_reduce(_GRADIENTS, 2):.3f} s")
    print(f"a step of 8 rows ({tokens:.0f} tokens): {one:.3f} s on one rank, {two:.3f} s on two")
    print(f"two trainings beside each other, each one rank with 4 rows: {beside:.3f} s")
    print(f"two ranks by the model: {expected:.3f} s, {expected / two - 1:+.0%}; their efficiency: {one / two / 2:.0%}")


def _train(folder: Path, ranks: int, steps: int, rows: int) -> tuple[float, float]:
    """`(median seconds, mean tokens)` of a step, with one thread a rank."""
    words = ["--model", _MODEL, "--data", str(EXAMPLE / "train.jsonl"), "--valid-share", "0"]
    words += [
        "--batch-size",
        str(rows),
        "--steps",
        str(steps),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--export",
        "none",
        "--quiet",
    ]
    words += ["--backend", "torch", "--rank", "16", "--output", str(folder)]
    devices = ["--devices", str(ranks)] if ranks > 1 else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / "cli.py"), "train", *words, *devices], check=True, cwd=ROOT, env=env)
    lines = [json.loads(line) for line in (Run(folder).path / "metrics.jsonl").read_text().splitlines()][1:]
    return float(np.median([line["seconds"] for line in lines])), float(np.mean([line["tokens"] for line in lines]))


def _loopback() -> Link:
    """Gloo between two processes of this machine, as it is now."""
    code = "from benchmarks.scale import reduce; reduce()"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*launcher, sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    small, large = json.loads(done.stdout.splitlines()[-1])
    return Link("gloo", _GRADIENTS / max(1e-9, large - small), small / 2)


def reduce() -> None:
    """Print the seconds of an all-reduce of one number and of an adapter's gradients; on two ranks."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    found = []
    for size in (1, _GRADIENTS // 4):
        tensor, times = torch.zeros(size), []
        for _ in range(12):
            began = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - began)
        found.append(float(np.median(times)))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--computed", action="store_true", help="measure nothing")
    parser.add_argument("--steps", type=int, default=20, help="of each training that is measured")
    parser.add_argument("--length", type=float, default=6.0, help="times the example's rows, for the model")
    given = parser.parse_args()
    if not given.computed:
        measured(given.steps)
    computed(given.length)


if __name__ == "__main__":
    main()

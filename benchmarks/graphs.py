"""Steps on an NVIDIA GPU as CUDA graphs and without, real sizes with random weights.

python -m benchmarks.graphs [--model gemma-3-1b] [--rows 8] [--tokens 100 250] [--checkpointing]

The median over ten different micro-batches, each seen twice before, so that its graph has been recorded. Utilization:
4 x parameters x real tokens and attention, over the device's own rate of large bf16 products, measured in this run.
"""

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np
import torch

from benchmarks.one_step import job_of
from benchmarks.random_model import CONFIGS
from benchmarks.step_time import device_rate, step_flops
from common.backend import Batch
from common.training.memory_estimate import model_dims
from torch_backend.backend import TorchBackend


def batches(rows: int, tokens: tuple[int, int], vocabulary: int) -> list[Batch]:
    """Rows of random lengths; the second half of each carries loss."""
    random, found = np.random.default_rng(0), []
    for _ in range(10):
        lengths = np.sort(random.integers(tokens[0], tokens[1] + 1, rows)).astype(np.int32)
        ids, targets = random.integers(3, vocabulary, (2, rows, lengths.max())).astype(np.int32)
        positions = np.arange(lengths.max())
        labeled = (positions >= lengths[:, None] // 2) & (positions < lengths[:, None])
        found.append(Batch(ids, targets, labeled.astype(np.float32), lengths))
    return found


def measure(case: dict[str, Any], tokens: tuple[int, int], graphs: bool, rate: float) -> str:
    folder, recipe, plan, adapter, config = job_of(case)
    backend = TorchBackend()
    backend.load(recipe, plan, folder, adapter)
    seconds, work = [], batches(case["rows"], tokens, config["vocab_size"])
    if graphs:
        # as often as in a run, where another graph for a size pays
        backend.expect(lambda: Counter(batch.shape for batch in work * 100))
    else:
        backend.graphs = None
    for epoch in range(3):
        for number, batch in enumerate(work):
            started = time.perf_counter()
            float(backend.train_step([batch], 1e-4, 10 * epoch + number + 1).loss_sum)
            seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[-10:])
    speed = statistics.mean(batch.tokens for batch in work) / step
    flops = statistics.mean(step_flops(model_dims(config), batch.lengths.tolist()) for batch in work)
    made = 0 if backend.graphs is None else len(backend.graphs.graphs)
    peak = backend.memory().peak
    backend.close()
    return f"{made or 'none'} | {step * 1e3:.1f} | {speed:.0f} | {flops / step / rate:.1%} | {peak / 1e9:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs=2, default=(100, 250), help="of a row: the least and the most")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    arguments = parser.parse_args()
    case = {
        **{name: getattr(arguments, name) for name in ("model", "layers", "rows", "quantization", "device")},
        "backend": "torch",
        "width": arguments.tokens[1],
        "gradient_checkpointing": arguments.checkpointing,
    }
    rate = device_rate(arguments.device, torch.bfloat16)
    print(f"{arguments.model}, rows of {arguments.tokens} tokens; large bf16 products: {rate / 1e12:.1f} TFLOP/s\n")
    print("| graphs | ms a step | tokens/s | utilization | peak GB |\n| --- | --- | --- | --- | --- |")
    for graphs in (True, False):
        print(f"| {measure(case, tuple(arguments.tokens), graphs, rate)} |", flush=True)


if __name__ == "__main__":
    main()

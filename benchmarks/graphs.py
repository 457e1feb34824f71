"""Steps on an NVIDIA GPU as CUDA graphs and without, real sizes with random weights.

python -m benchmarks.graphs [--model gemma-3-1b] [--rows 8] [--tokens 100 250] [--checkpointing]

The median over ten different micro-batches, each seen twice before, so that its graph has been recorded.
"""

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np

from benchmarks.one_step import job_of
from benchmarks.random_model import CONFIGS
from common.backend import Batch
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


def measure(case: dict[str, Any], tokens: tuple[int, int], graphs: bool) -> str:
    folder, recipe, plan, adapter, config = job_of(case)
    backend = TorchBackend()
    backend.load(recipe, plan, folder, adapter)
    seconds, work = [], batches(case["rows"], tokens, config["vocab_size"])
    if graphs:
        backend.expect(lambda: Counter(batch.shape for batch in work * 3))
    else:
        backend.graphs = None
    for epoch in range(3):
        for number, batch in enumerate(work):
            started = time.perf_counter()
            float(backend.train_step([batch], 1e-4, 10 * epoch + number + 1).loss_sum)
            seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[-10:])
    speed = statistics.mean(batch.tokens for batch in work) / step
    made = 0 if backend.graphs is None else len(backend.graphs.graphs)
    peak = backend.memory().peak
    backend.close()
    return f"{made or 'none'} | {step * 1e3:.1f} | {speed:.0f} | {peak / 1e9:.2f}"


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
    print("| graphs | ms a step | tokens/s | peak GB |\n| --- | --- | --- | --- |")
    for graphs in (True, False):
        print(f"| {measure(case, tuple(arguments.tokens), graphs)} |", flush=True)


if __name__ == "__main__":
    main()

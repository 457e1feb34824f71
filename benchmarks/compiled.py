"""What torch.compile would give: steps of the torch backend as it is, then with every layer compiled.

python -m benchmarks.compiled [--precision fp32]
"""

import argparse
import statistics
import time

import torch

from benchmarks.one_step import backend_of, batch_of

WIDTHS = (120, 120, 120, 120, 100, 140, 90, 130)  # tokens of the three rows of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    case = {"backend": "torch", "rows": 3, "width": max(WIDTHS), "rank": 8, "labeled": 1} | vars(arguments)
    backend, config = backend_of(case)
    print("| | first step, s | median of the others, s |\n| --- | --- | --- |")
    for name in ("as it is", "compiled"):
        seconds = []
        for step, width in enumerate(WIDTHS, 1):
            started = time.perf_counter()
            float(backend.train_step([batch_of(case | {"width": width}, config["vocab_size"])], 1e-4, step).loss_sum)
            seconds.append(time.perf_counter() - started)
        print(f"| {name} | {seconds[0]:.1f} | {statistics.median(seconds[1:]):.2f} |", flush=True)
        for layer in backend.model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)


if __name__ == "__main__":
    main()

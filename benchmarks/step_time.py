"""Where a step's time goes on torch, beside the device's own product rate in the same run.

    python -m benchmarks.step_time --data rows.jsonl [--model MODEL] [--device cuda] [--precision bf16]

Layers compute as in training, with PyTorch's kernels instead of Triton's, or each compiled by torch.compile (--layers).

On a GPU the device's idle time is what a step takes by the clock, less what its kernels take: nothing runs then, as the
program has not started a kernel yet. The profiler slows the program, so the clock's time is that of a step without it.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks.one_step import recipe_of
from benchmarks.regret_data import SPEED_SETS, speed_file
from common.backend import Batch
from common.data.batching import micro_batches, step_rows
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.memory_terms import ModelDims
from common.models.lora_init import initial_adapter, layer_count
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.recipe import Plan
from common.training.memory_estimate import model_dims
from torch_backend import fused
from torch_backend.backend import TorchBackend
from torch_backend.memory_terms import loss_chunk

_MEASURED = range(2, 6)  # steps
_AT_ONCE = {"cpu": 2048, "cuda": 8192}  # tokens; the most that `train` takes, which a GPU has the memory for
_SQUARES = (4096, 6144, 8192)
# What a kernel's or an operation's name says; the first that fits.
_PARTS = {
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|gemv|cublas|nvjet|xmma|cutlass|^aten::(add|b)?mm_?$|^aten::linear|^mkldnn::",
    "norms": r"norm|rsqrt",
    "activations": r"^_gated|gelu|silu",
    "rotation": r"^_rotated|addcmul",
}


def peak_rate(rows: int, hidden: int, inner: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the model's largest product, the best of five runs."""
    x, weight = (torch.randn(size, hidden, device=device, dtype=dtype) for size in (rows, inner))
    best = float("inf")
    for _ in range(6 if device == "cpu" else 50):  # a GPU raises its clock first
        started = time.perf_counter()
        for _ in range(10):
            found = x @ weight.T
        float(found[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 10 * 2 * rows * hidden * inner / best


def device_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products, the best of several sizes: what utilization is a share of."""
    return max(peak_rate(size, size, size, device, dtype) for size in ((1024,) if device == "cpu" else _SQUARES))


def step_flops(sizes: ModelDims, lengths: list[int]) -> float:
    """4 x parameters x tokens, and what attention computes: of a frozen model, forward and backward.

    Attention's two products of each pair of tokens are four operations a value, and its backward pass takes twice as
    many as the forward pass.
    """
    pairs = 0.0
    for window in sizes.windows or (None,) * sizes.layers:
        for length in lengths:
            seen = min(length, window or length)
            pairs += length * seen - seen**2 / 2
    return 4.0 * (sizes.linear + sizes.other) * sum(lengths) + 3 * 4 * sizes.queries * pairs


def part_of(name: str) -> str:
    return next((part for part, pattern in _PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(backend: TorchBackend, batches: list[Batch], device: str) -> None:
    """Print what a step's time goes into: by operation on a CPU, by kernel on a GPU."""
    started = time.perf_counter()
    float(backend.train_step(batches, 1e-4, 6).loss_sum)
    wall = time.perf_counter() - started
    activities = torch.profiler.ProfilerActivity
    activity, counted = (
        (activities.CPU, "self_cpu_time_total") if device == "cpu" else (activities.CUDA, "self_device_time_total")
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        float(backend.train_step(batches, 1e-4, 7).loss_sum)
    seconds = {event.key: getattr(event, counted) / 1e6 for event in profiler.key_averages()}
    parts = dict.fromkeys([*_PARTS, "other"], 0.0)
    for name, own in seconds.items():
        parts[part_of(name)] += own
    total = busy = sum(parts.values())
    if device == "cuda":
        total = max(wall, busy)
        parts["idle"] = total - busy
    print(f"a step of {wall * 1e3:.1f} ms, in shares of {total * 1e3:.1f} ms:")
    print("  " + ", ".join(f"{part} {own / total:.1%}" for part, own in parts.items()))
    for name, own in sorted(seconds.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name[:60]:60} {own / total:6.1%}  {part_of(name)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="chat-like", help=f"a file, or {' or '.join(SPEED_SETS)}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layers", choices=["trained", "torch", "compiled"], default="trained")
    arguments = parser.parse_args()
    device, dtype = arguments.device, {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    model = resolve(arguments.model, print)
    recipe = recipe_of({"rows": arguments.batch, "width": 1023, "precision": arguments.precision})
    encoder = Encoder(load_tokenizer(model.path, None), MaskingOptions())
    with tempfile.TemporaryDirectory() as folder:
        (rows,), _ = encode_parts([read_rows(speed_file(arguments.data, Path(folder)))], encoder, "error")
    shapes, sizes = linear_shapes(model, ["all-linear"]), model_dims(model.config)
    rate = peak_rate(800 if device == "cpu" else 8192, sizes.hidden, sizes.inner, device, dtype)
    backend = TorchBackend()
    chunk = loss_chunk(sizes.vocabulary, device)
    plan = Plan(backend="torch", device=device, micro_batch_tokens=_AT_ONCE[device], loss_chunk=chunk, save_every=1)
    backend.load(recipe, plan, model.path, initial_adapter(shapes, layer_count(shapes), recipe))
    steps = {n: [rows[i] for i in step_rows(len(rows), arguments.batch, 0, n)] for n in range(1, 7)}
    batches = {n: micro_batches(chosen, plan.micro_batch_tokens, device) for n, chosen in steps.items()}
    backend.expect(lambda: Counter({batch.shape: 100 for step in batches.values() for batch in step}))

    def run(number: int) -> int:
        result = backend.train_step(batches[number], 1e-4, number)
        float(result.loss_sum)  # waits for the device
        return result.label_tokens

    if arguments.layers != "trained":
        fused.use(None)
    if arguments.layers == "compiled":
        for layer in backend.model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    started = time.perf_counter()
    for number in [1] if device == "cpu" else [*batches] * 2:  # until all CUDA graphs are recorded
        run(number)
    print(f"{time.perf_counter() - started:.1f} s until compiled and recorded")
    started = time.perf_counter()
    labels = sum(map(run, _MEASURED))
    seconds = time.perf_counter() - started
    lengths = [len(row.ids) - 1 for number in _MEASURED for row in steps[number]]
    tokens = sum(lengths)
    # forward, and the gradient of the input: four operations a weight; the head's at labels only
    work = 4 * sizes.linear * tokens + 4 * sizes.vocabulary * sizes.hidden * labels
    flops = step_flops(sizes, lengths)
    print(f"{tokens / seconds:.1f} tokens/s, {labels / seconds:.1f} label tokens/s")
    print(f"the base's products: {work / seconds / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s ({work / seconds / rate:.0%})")
    square = device_rate(device, dtype)
    share = f"{flops / seconds / square:.1%} of the {square / 1e9:.0f} GFLOP/s of large ones"
    print(f"utilization, by 4 x parameters x tokens and attention: {share}")
    profile(backend, batches[6], device)


if __name__ == "__main__":
    main()

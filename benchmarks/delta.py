"""The gated delta rule of Qwen3.5, forward and backward: ours against mlx-lm's, MLX's and transformers'; Markdown.

    python -m benchmarks.delta                      # 256, 1,024 and 4,096 tokens, Qwen3.5-0.8B's heads, on the CPU
    python -m benchmarks.delta --device gpu --only mlx
    python -m benchmarks.delta --device cuda --only torch

One row, 16 heads of 128, float32. Each runs in a process of its own. Memory is the peak above the inputs: MLX's or
CUDA's allocator, or the growth of torch's process on a CPU. Time is the better of two runs, after a first one.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HEADS, WIDTH = 16, 128
WAYS = ("mlx ours", "mlx mlx-lm", "mlx mx.fast", "torch ours", "torch transformers")


def inputs(tokens: int) -> list[np.ndarray]:
    """Queries, keys and values [1, H, T, D], the logarithm of the decay, and beta."""
    random = np.random.default_rng(0)
    queries, keys, values = random.normal(size=(3, 1, HEADS, tokens, WIDTH)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True) * WIDTH**0.5
    gates = random.uniform(size=(2, 1, HEADS, tokens)).astype(np.float32)
    return [queries, keys, values, -gates[0], gates[1]]


def with_mlx(way: str, tokens: int, device: str) -> dict[str, float]:
    importlib.import_module("mlx_backend.backend")  # before mlx is imported
    import mlx.core as mx
    from mlx_lm.models.gated_delta import gated_delta_ops

    from mlx_backend.gated_delta import gated_delta

    def of(*parts: mx.array) -> mx.array:
        if way == "mlx ours":
            return gated_delta([*parts])[0]
        turned = [part.swapaxes(1, 2) for part in parts]
        turned[3] = mx.exp(turned[3])
        return (gated_delta_ops if way == "mlx mlx-lm" else mx.fast.gated_delta_update)(*turned)[0]

    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    given = [mx.array(part) for part in inputs(tokens)]
    gradient = mx.grad(lambda *parts: mx.square(of(*parts)).sum(), argnums=(0, 1, 2, 3, 4))
    mx.eval(given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = timed(lambda: mx.eval(gradient(*given)))
    return {"seconds": seconds, "bytes": mx.get_peak_memory() - before}


def with_torch(way: str, tokens: int, device: str) -> dict[str, float]:
    import torch

    from common.system.memory import ResidentSet
    from torch_backend.host_memory import return_large_blocks

    if way == "torch ours":
        from torch_backend.gated_delta import GatedDelta

        rule: Callable[..., Any] = GatedDelta.apply
    else:
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        def rule(*parts: Any) -> Any:
            queries, *rest = (part.transpose(1, 2) for part in parts)
            return torch_chunk_gated_delta_rule(queries * WIDTH**0.5, *rest)[0]

    def run(tokens: int = tokens) -> None:
        given = [part[:, :, :tokens] for part in parts]
        torch.autograd.grad(rule(*given).square().sum(), parts)
        if device == "cuda":
            torch.cuda.synchronize()

    parts = [torch.tensor(part, device=device, requires_grad=True) for part in inputs(tokens)]
    return_large_blocks()
    run(64)  # what libraries take once is not counted
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, resident = torch.cuda.memory_allocated() if device == "cuda" else 0, ResidentSet()
    seconds = timed(run)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident.peak()
    return {"seconds": seconds, "bytes": peak - before}


def timed(run: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def apart(way: str, tokens: int, device: str) -> dict[str, float] | None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.delta", "--one", way, str(tokens), device]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.delta")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--device", choices=("cpu", "gpu", "cuda"), default="cpu", help="gpu: MLX's; cuda: torch's")
    parser.add_argument("--only", default="", help="a word of the ways to run")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "TOKENS", "DEVICE"), help="one, as JSON")
    given = parser.parse_args()
    if given.one:
        way, tokens, device = given.one
        print(json.dumps((with_mlx if way.startswith("mlx") else with_torch)(way, int(tokens), device)))
        return
    print(
        "| way | tokens | seconds | against ours | MB | against ours |\n| --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    ours: dict[str, Any] = {}
    for tokens in given.tokens:
        for way in [way for way in WAYS if given.only in way]:
            found = apart(way, tokens, given.device)
            if found is None:
                print(f"| {way} | {tokens} | failed | | | |", flush=True)
                continue
            ours = found if way.endswith("ours") else ours
            ratios = [f"{found[name] / ours[name]:.1f}x" for name in ("seconds", "bytes")]
            seconds, size = f"{found['seconds']:.2f}", f"{found['bytes'] / 1e6:.0f}"
            print(f"| {way} | {tokens} | {seconds} | {ratios[0]} | {size} | {ratios[1]} |", flush=True)


if __name__ == "__main__":
    main()

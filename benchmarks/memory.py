"""Estimated against measured peak memory, both backends, real sizes with random weights; prints Markdown and JSON.

    python -m benchmarks.memory                  # forty configurations, more than an hour on two cores
    python -m benchmarks.memory --only mlx nf4   # those whose description contains one of the words
    python -m benchmarks.memory --real-sizes     # Gemma-3 1B and 4B at full depth, 16 rows of 512 tokens a step
    python -m benchmarks.memory --device cuda    # twelve configurations of the torch backend on an NVIDIA GPU
    python -m benchmarks.memory --device gpu     # those of the MLX backend on MLX's GPU, in bf16

Every configuration runs in a process of its own: load, then three steps of one micro-batch. The peak does not change
after those (AdamW's moments are touched at the end of the first). Real sizes take one step on MLX, two on torch.
Measured is what the backend counts: MLX's or CUDA's allocator, or the growth of torch's process (anonymous and mapped)
since before loading. On CUDA one process runs them all, and the most that its allocator had reserved is printed too.
A configuration that fails is a row with its fault; exits with status 1 at the end.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.one_step import measure
from benchmarks.random_model import CONFIGS
from common.errors import UserError, first_line

ROOT = Path(__file__).resolve().parent.parent
_SMOL, _QWEN, _SMALL, _ONE = "smollm2-135m", "qwen3-0.6b", "gemma-3-270m", "gemma-3-1b"
_NETS = {"model": "qwen3.5-0.8b", "precision": "fp32", "layers": 8}
_CONVOLUTIONS = {"model": "lfm2-1.2b", "precision": "fp32", "layers": 6}
_LONG = {"rows": 1, "width": 1024, "gradient_checkpointing": True}
# Families besides, at their real widths in a few layers.
_OTHERS: tuple[dict[str, Any], ...] = (
    {"model": "gemma-4-e2b", "layers": 10},
    {"model": "gemma-4-e2b", "layers": 10} | _LONG,
    {"model": "gemma-2-2b", "layers": 4, "width": 128},
    {"model": "glm-4-9b-0414", "layers": 2, "width": 128},
    {"model": "granite-4.0-1b", "layers": 6},
    {"model": "exaone-4.0-1.2b", "layers": 6},
    {"model": "olmo-2-0425-1b", "layers": 4},
    {"model": "ministral-3-3b", "layers": 4},
    {"model": "phi-4-mini", "layers": 4, "width": 128},
    {"model": "smollm3-3b", "layers": 4},
)
CASES: list[dict[str, Any]] = [
    {"backend": "torch", "model": _SMOL, "precision": "fp32", "rows": 8, "width": 128},
    {"backend": "torch", "model": _SMOL, "precision": "fp32", "rows": 1, "width": 1024, "gradient_checkpointing": True},
    {"backend": "torch", "model": _SMOL, "precision": "bf16", "rows": 4, "width": 256, "rank": 64},
    {"backend": "torch", "model": _QWEN, "precision": "fp32", "rows": 2, "width": 128},
    {"backend": "torch", "model": _QWEN, "precision": "bf16", "rows": 4, "width": 256, "layers": 6},
    {"backend": "torch", "model": _SMALL, "precision": "fp32", "rows": 4, "width": 256},
    {"backend": "torch", "model": _SMALL, "precision": "bf16", "rows": 2, "width": 512, "gradient_checkpointing": True},
    {"backend": "torch", "model": _ONE, "precision": "fp32", "rows": 2, "width": 256, "layers": 6},
    {
        "backend": "torch",
        "model": _ONE,
        "precision": "bf16",
        "rows": 2,
        "width": 256,
        "quantization": "nf4",
        "layers": 8,
    },
    *(
        model | {"backend": backend} | case
        for model in (_NETS, _CONVOLUTIONS)
        for backend in ("torch", "mlx")
        for case in ({"rows": 2, "width": 256}, _LONG)
    ),
    *(
        {"backend": backend, "precision": "fp32", "rows": 2, "width": 256} | case
        for backend in ("torch", "mlx")
        for case in _OTHERS
    ),
    {"backend": "mlx", "model": _SMOL, "precision": "fp32", "rows": 8, "width": 128},
    {"backend": "mlx", "model": _SMOL, "precision": "fp32", "rows": 1, "width": 1024, "gradient_checkpointing": True},
    {"backend": "mlx", "model": _QWEN, "precision": "fp32", "rows": 2, "width": 128},
    {"backend": "mlx", "model": _SMALL, "precision": "fp32", "rows": 4, "width": 256},
    {"backend": "mlx", "model": _SMALL, "precision": "fp32", "rows": 2, "width": 512, "gradient_checkpointing": True},
    {"backend": "mlx", "model": _ONE, "precision": "fp32", "rows": 2, "width": 256, "layers": 6},
    {"backend": "mlx", "model": _SMALL, "precision": "fp32", "rows": 1, "width": 64, "quantization": "mlx-4bit-64"},
]


CUDA_CASES: list[dict[str, Any]] = [
    {"backend": "torch", "device": "cuda", "precision": "bf16", "rows": 4, "width": 256} | case
    for case in (
        {"model": _SMOL, "rows": 8, "width": 128},
        {"model": _SMOL, "rows": 16, "width": 512},
        {"model": _SMOL, "rows": 4, "width": 1024, "gradient_checkpointing": True},
        {"model": _SMOL, "precision": "fp32"},
        {"model": _QWEN, "rank": 64},
        {"model": _QWEN, "rows": 8, "width": 512, "gradient_checkpointing": True},
        {"model": _SMALL, "rows": 2, "width": 1024},
        {"model": _SMALL, "rows": 8, "width": 512, "gradient_checkpointing": True},
        {"model": _ONE},
        {"model": _ONE, "rows": 4, "width": 512, "gradient_checkpointing": True},
        {"model": _ONE, "rows": 2, "width": 512, "quantization": "nf4"},
        {
            "model": "gemma-3-4b",
            "layers": 17,
            "rows": 1,
            "width": 512,
            "quantization": "nf4",
            "gradient_checkpointing": True,
        },
    )
]


# Rows of 512 tokens, 16 a step, rank 16, all linear layers: one micro-batch, as large as the limit allows.
REAL: list[dict[str, Any]] = [
    {"backend": "torch", "model": _SMALL, "precision": "bf16", "limit": 2.0},
    {"backend": "torch", "model": _ONE, "precision": "bf16", "limit": 3.5},
    {"backend": "torch", "model": "gemma-3-4b", "precision": "bf16", "quantization": "nf4", "limit": 6.5, "most": 1},
    # too slow at full depth: measured at two depths and extrapolated. MLX queues fewer than four layers all at once,
    # so the line would be too steep from there.
    {"backend": "mlx", "model": _ONE, "precision": "bf16", "limit": 3.5, "most": 1, "depths": [4, 8], "labeled": 0.07},
    {
        "backend": "mlx",
        "model": "gemma-3-4b",
        "precision": "bf16",
        "quantization": "mlx-4bit-64",
        "limit": 6.5,
        "most": 1,
        "depths": [4, 6],
        "labeled": 0.07,
    },
]


def real_sizes(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    print("| configuration | limit GB | estimated GB | measured GB | how |\n| --- | --- | --- | --- | --- |")
    found = []
    for case in cases:
        case = {"width": 512, "gradient_checkpointing": True} | case
        try:
            found += _real_size(case.copy())
        except Failed as failed:
            found.append(_failed(case | {"rows": case.get("most", 4)}, failed, 3))
    return found


def _real_size(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Print a row. Raises Failed."""
    layers = CONFIGS[case["model"]]["num_hidden_layers"]
    limit, depths, most = case.pop("limit"), case.pop("depths", [layers]), case.pop("most", 4)
    for rows in [rows for rows in (4, 2, 1) if rows <= most]:
        estimate = run(case | {"rows": rows, "predict_only": True})
        if estimate["predicted"] <= limit * 1e9:
            break
    steps = 2 if case["backend"] == "torch" else 1
    peaks = [run(case | {"rows": rows, "layers": depth, "steps": steps}) for depth in depths]
    peak, how = peaks[-1]["peak"], f"one step of {peaks[-1]['seconds']:.0f} s"
    if len(depths) == 2:
        per_layer = (peaks[1]["peak"] - peaks[0]["peak"]) / (depths[1] - depths[0])
        peak = peaks[1]["peak"] + per_layer * (layers - depths[1])
        how = f"the line through {depths[0]} and {depths[1]} of {layers} layers"
    print(
        f"| {described(case | {'rows': rows})} | {limit} | {estimate['predicted'] / 1e9:.2f} "
        f"| {peak / 1e9:.2f} | {how} |",
        flush=True,
    )
    return peaks


class Failed(Exception):
    """A configuration that could not be measured, by its fault."""


def _failed(case: dict[str, Any], failed: Failed, columns: int) -> dict[str, Any]:
    print(f"| {described(case)} |{' |' * columns} failed: {str(failed).replace('|', '/')} |", flush=True)
    return {"case": case, "fault": str(failed)}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own. Raises Failed."""
    command = [sys.executable, "-m", "benchmarks.one_step", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        lines = (done.stderr.strip() or f"status {done.returncode}").splitlines()
        raise Failed(next((line for line in reversed(lines) if "Error" in line), lines[-1]))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _run_here(case: dict[str, Any]) -> dict[str, Any]:
    """Raises Failed."""
    try:
        return measure(case)
    except (UserError, RuntimeError) as error:
        raise Failed(first_line(error)) from error


def described(case: dict[str, Any]) -> str:
    """`torch fp32 smollm2-135m, 8 x 128 tokens, checkpointing`"""
    words = [case["backend"], case["precision"], case["model"]]
    if case.get("quantization"):
        words.append(case["quantization"])
    if case.get("layers"):
        words.append(f"({case['layers']} layers)")
    rest = [f"{case['rows']} x {case['width']} tokens"]
    rest += [f"rank {case['rank']}"] if "rank" in case else []
    rest += ["checkpointing"] if case.get("gradient_checkpointing") else []
    return ", ".join([" ".join(words), *rest])


def chosen_by(words: list[str], name: str) -> bool:
    return any(word in name for word in words)


def table(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gpu = any(case.get("device") == "cuda" for case in cases)
    names = ["configuration", "estimated GB", "measured GB", "difference", "largest part after the weights"]
    names += ["reserved GB"] if gpu else []
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    found = []
    for case in cases:
        try:
            result = (_run_here if case.get("device") == "cuda" else run)(case | {"steps": 3})
        except Failed as failed:
            found.append(_failed(case, failed, len(names) - 2))
            continue
        found.append(result)
        parts = {name: size for name, size in result["parts"].items() if name != "weights"}
        name = max(parts, key=lambda part: parts[part])
        print(
            f"| {described(case)} | {result['predicted'] / 1e9:.3f} | {result['peak'] / 1e9:.3f} | "
            f"{result['predicted'] / result['peak'] - 1:+.1%} | {name}, {parts[name] / 1e9:.3f} GB |"
            + (f" {result['reserved'] / 1e9:.3f} |" if gpu else ""),
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the configurations to run")
    parser.add_argument("--real-sizes", action="store_true", help="Gemma-3 270M, 1B and 4B against the limits of use")
    parser.add_argument("--device", choices=["cpu", "cuda", "gpu"], default="cpu", help="gpu: MLX's")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    if arguments.real_sizes:
        chosen = [case for case in REAL if chosen_by(arguments.only, f"{case['backend']} {case['model']}")]
        found = real_sizes(chosen)
    else:
        cases = CUDA_CASES if arguments.device == "cuda" else CASES
        if arguments.device == "gpu":
            cases = [case | {"device": "gpu", "precision": "bf16"} for case in CASES if case["backend"] == "mlx"]
        found = table([case for case in cases if chosen_by(arguments.only, described(case))])
        measured = [result for result in found if "fault" not in result]
        worst = max((abs(result["predicted"] / result["peak"] - 1) for result in measured), default=0.0)
        print(f"\n{len(measured)} of {len(found)} configurations measured, the worst {worst:.1%} away")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if any("fault" in result for result in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

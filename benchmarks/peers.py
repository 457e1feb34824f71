"""Twintune against its peers on the same rows, the same LoRA, the same machine, in one run; prints Markdown and JSON.

    python -m benchmarks.peers                                   # SmolLM2-135M on rows of the built-in example
    python -m benchmarks.peers --data wikisql.jsonl --model google/gemma-3-270m

Each peer has an environment of its own in the user's cache, made once. Everyone sees the same rows once, in steps of
the same size; runs go in turn, A B C A B C. tokens/s: real tokens of those rows over the time of all steps; after the
first: of all steps but that one, which warms up; steady: of the second half of the steps. peak: the resident set of the
whole process, as the system counts it for everyone. The validation loss after equal data is computed by Twintune for
every adapter alike; exits with status 1 where Twintune's is worse than a peer's by more than 0.01. `twintune-lean` is
the torch backend with gradient checkpointing.

    python -m benchmarks.peers --device cuda --peers twintune-torch trl trl-best unsloth

    python -m benchmarks.peers --device gpu --steps 200 --batch 8   # MLX's GPU: Twintune and mlx_lm.lora

On a GPU the peak is what the framework's allocator had given out at the most. MLX begins without compiled kernels.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch_backend
from benchmarks.one_step import recipe_of
from benchmarks.peer_runs import PEERS, QUANTIZED, ROOT, RUN_ON, RUNNERS, environment
from common.data.batching import micro_batches
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.models.adapter_files import read_any
from common.models.lora_init import layer_count
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.recipe import Plan
from common.system.environment import chip
from common.system.hardware import nvidia_gpus
from common.training.validation import evaluate

_HELD = 40  # rows, the last of the file


def valid_loss(folder: Path, adapter: Path, rows: list[Encoded], rank: int, device: str) -> float:
    """By Twintune's torch backend in float32, for every adapter alike."""
    found = read_any(adapter, layer_count(linear_shapes(ModelFolder(folder), ["all-linear"])))
    backend = torch_backend.create()
    plan = Plan(backend="torch", device=device, micro_batch_tokens=1024, save_every=1)
    backend.load(recipe_of({"rows": 4, "width": 8, "precision": "fp32", "rank": rank}), plan, folder, found)
    loss = evaluate(backend, micro_batches(rows, 1024, device))
    backend.close()
    return loss


def prepare(arguments: argparse.Namespace, folder: Path, work: Path) -> tuple[list[Encoded], list[Encoded]]:
    """The rows of every run, as each peer reads them; `(training rows, rows held out)` in tokens."""
    every = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    count = arguments.steps * arguments.batch
    held, left = every[-_HELD:], every[:-_HELD]
    if not left:
        raise SystemExit(f"{arguments.data} has {len(every)} rows: more than {_HELD} are needed.")
    lines = [left[number % len(left)] for number in range(count)]
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (work / "held.jsonl").write_text("\n".join(held) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    split = [
        row if "text" in row else {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows
    ]
    (work / "split.jsonl").write_text("\n".join(map(json.dumps, split)) + "\n", encoding="utf-8")
    encoder = Encoder(load_tokenizer(folder, None), MaskingOptions(train_on="last"))  # as TRL trains a completion
    (rows, held), _ = encode_parts([read_rows(work / f"{name}.jsonl") for name in ("rows", "held")], encoder, "error")
    return rows, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=str(ROOT / "examples" / "data" / "train.jsonl"))
    parser.add_argument("--device", choices=list(RUN_ON), default="cpu", help="gpu: MLX's")
    parser.add_argument("--peers", nargs="+", choices=list(RUNNERS), help="by default all that run on the device")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of Twintune on torch and of trl-best; as a rule what the device computes fastest",
    )
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none", help="of Twintune on torch, Unsloth")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    arguments.peers = arguments.peers or list(RUN_ON[arguments.device])
    if arguments.steps < 2:
        parser.error("--steps: at least 2, because the first one is slower.")
    if arguments.quantization != "none" and (others := {*arguments.peers} - {*QUANTIZED}):
        parser.error(f"--quantization is for --peers {' '.join(QUANTIZED)} alone, not {', '.join(sorted(others))}.")
    torch_device = arguments.device if arguments.device != "gpu" else "cpu"  # of the validation losses
    arguments.precision = arguments.precision or torch_backend.choose_precision("auto", torch_device).value
    pythons = {peer: environment(peer, arguments.device) for peer in arguments.peers}
    folder = resolve(arguments.model, lambda text: print(text, file=sys.stderr)).path
    results: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows, held = prepare(arguments, folder, work)
        for number in range(arguments.rounds):
            for peer in arguments.peers:
                output = str(work / f"{peer}-{number}")
                job = vars(arguments) | {"peer": peer, "model": str(folder), "output": output, "json": None}
                job["python"] = pythons[peer]
                result = RUNNERS[peer](job | {"rows": str(work / "rows.jsonl"), "data": str(work / "split.jsonl")})
                results[peer].append(result)
                print(
                    f"{peer}, round {number + 1}: {statistics.median(result['seconds'][1:]):.2f} s/step",
                    file=sys.stderr,
                )
        for runs in results.values():  # after all runs: Linux counts a parent's peak as its later children's too
            runs[0]["loss"] = valid_loss(folder, Path(runs[0]["adapter"]), held, arguments.rank, torch_device)
    tokens = sum(len(row.ids) - 1 for row in rows)
    report(arguments, results, tokens, sum(row.label_tokens for row in rows))
    losses = {peer: runs[0]["loss"] for peer, runs in results.items()}
    best = min((loss for peer, loss in losses.items() if PEERS[peer]), default=float("inf"))
    worse = [peer for peer, loss in losses.items() if not PEERS[peer] and loss > best + 0.01]
    if worse:
        raise SystemExit(f"The validation loss of {', '.join(worse)} is worse than the best of the others, {best:.4f}.")


def speed_of(tokens: int, seconds: list[float], first: int) -> float:
    """Tokens a second from step `first` on; every step has as many on average."""
    return tokens * (1 - first / len(seconds)) / sum(seconds[first:])


def machine(device: str) -> str:
    if device == "cpu":
        return f"{chip()}, {os.cpu_count()} cores, {platform.system()}, a CPU's figures"
    gpus = nvidia_gpus()
    return f"{gpus[0].name if gpus else 'a GPU'}, {platform.system()}"


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]], tokens: int, labels: int) -> None:
    figures = {}
    for peer, runs in results.items():
        halfway = len(runs[0]["seconds"]) // 2
        speeds = [statistics.median(speed_of(tokens, r["seconds"], first) for r in runs) for first in (0, 1, halfway)]
        step = statistics.median(second for r in runs for second in r["seconds"][1:])
        figures[peer] = (speeds, step, statistics.median(r["peak"] for r in runs), runs[0]["loss"])
    first = arguments.peers[0]
    base_speeds, _, base_peak, _ = figures[first]
    print(
        f"{arguments.model}, {Path(arguments.data).name}: {arguments.steps} steps of {arguments.batch} rows, "
        f"{tokens} tokens, {labels} of them labels; rank {arguments.rank}; "
        f"Twintune on torch and trl-best in {arguments.precision}, quantization {arguments.quantization}; "
        f"{arguments.rounds} rounds in turn. {machine(arguments.device)}\n"
    )
    print(
        f"| | tokens/s | {first} is faster by | after the first step | by | steady | by | median step | peak memory "
        "| its share of it | validation loss |"
    )
    print(f"|{' --- |' * 11}")
    for peer, (speeds, step, peak, loss) in figures.items():
        compared = [f"{own:.1f} | {base / own:.2f}x" for own, base in zip(speeds, base_speeds, strict=True)]
        print(
            f"| {peer} | {' | '.join(compared)} | {step:.3f} s | {peak / 1e9:.2f} GB | {base_peak / peak:.2f} "
            f"| {loss:.4f} |"
        )
    if arguments.json:
        content = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "tokens": tokens, "runs": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

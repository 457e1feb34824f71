"""Twintune against its peers on the same rows, the same LoRA, the same machine, in one run; prints Markdown and JSON.

    python -m benchmarks.peers                                   # SmolLM2-135M on chat-like rows
    python -m benchmarks.peers --data wikisql.jsonl --model google/gemma-3-270m

Each peer has an environment of its own in the user's cache, made once, when its turn comes; mlx-lm runs in this one
where this one has it. Everyone sees the same rows, in steps of the same size; runs go in turn, A B C A B C. Each is a
line of JSON when it ends; one that fails is a row with its reason, and the others go on. tokens/s: real tokens of those
rows over the time of all steps; after the first: of all steps but that one, which warms up; steady: of the second half
of the steps. peak: the resident set of the whole process, as the system counts it for everyone. The validation loss
after equal data is computed by Twintune for every adapter alike, last of all. Exits with status 1 where Twintune failed
or its loss is worse than a peer's by more than 0.01. `twintune-lean` is the torch backend with gradient checkpointing.

    python -m benchmarks.peers --device cuda --peers twintune-torch trl trl-best unsloth

    python -m benchmarks.peers --device gpu --steps 200 --batch 8 --data mixed   # MLX's GPU, rows of 20 to 1,000 tokens

On a GPU the peak is what the framework's allocator had given out at the most. MLX begins without compiled kernels.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch_backend
from benchmarks.one_step import recipe_of
from benchmarks.peer_environments import PEERS, Failed, environment, versions
from benchmarks.peer_runs import QUANTIZED, RUN_ON, RUNNERS
from benchmarks.regret_data import SPEED_SETS, speed_file
from common.data.batching import micro_batches
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.load import read_rows
from common.errors import first_line
from common.files import atomic_write
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
    every = speed_file(arguments.data, work).read_text(encoding="utf-8").splitlines()
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
    parser.add_argument("--data", default="chat-like", help=f"a file, or {' or '.join(SPEED_SETS)}")
    parser.add_argument("--device", choices=list(RUN_ON), default="cpu", help="gpu: MLX's")
    parser.add_argument("--peers", nargs="+", choices=list(RUNNERS), help="by default all that run on the device")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=86400.0, help="seconds of a run")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of Twintune on torch and of trl-best; as a rule what the device computes fastest",
    )
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none", help="of Twintune on torch, Unsloth")
    parser.add_argument("--json", type=Path, help="write the results here too, after each run")
    arguments = parser.parse_args()
    arguments.peers = arguments.peers or list(RUN_ON[arguments.device])
    if arguments.steps < 2:
        parser.error("--steps: at least 2, because the first one is slower.")
    if arguments.quantization != "none" and (others := {*arguments.peers} - {*QUANTIZED}):
        parser.error(f"--quantization is for --peers {' '.join(QUANTIZED)} alone, not {', '.join(sorted(others))}.")
    torch_device = arguments.device if arguments.device != "gpu" else "cpu"
    arguments.precision = arguments.precision or torch_backend.choose_precision("auto", torch_device).value
    folder = resolve(arguments.model, lambda text: print(text, file=sys.stderr)).path
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows, held = prepare(arguments, folder, work)
        results = {"tokens": sum(len(row.ids) - 1 for row in rows), "labels": sum(row.label_tokens for row in rows)}
        runs = run_all(arguments, folder, work, results)
        for own in runs.values():  # after all runs: Linux counts a parent's peak as its later children's too
            if not failure(own):
                own[0] |= loss_of(arguments, folder, own[0], held)
                write(arguments, results, runs)
    report(arguments, runs, results["tokens"], results["labels"])
    if fault := verdict(runs):
        raise SystemExit(fault)


def run_all(
    arguments: argparse.Namespace, folder: Path, work: Path, counts: dict[str, int]
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each peer, in turn; one that fails is `failed`, by its reason, and the last of its peer."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    for number in range(arguments.rounds):
        for peer in arguments.peers:
            if failure(runs[peer]):
                continue
            files = {"rows": str(work / "rows.jsonl"), "data": str(work / "split.jsonl")}
            job = vars(arguments) | files | {"peer": peer, "model": str(folder), "json": None}
            runs[peer].append(run_of(job | {"output": str(work / f"{peer}-{number}")}))
            print(json.dumps({"peer": peer, "round": number + 1} | runs[peer][-1]), flush=True)
            write(arguments, counts, runs)
    return runs


def run_of(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run, and the versions in its Python; `failed` where there are none."""
    try:
        python = environment(job["peer"], job["device"])
        known = versions(python)
        found = RUNNERS[job["peer"]](job | {"python": python}) | {"versions": known}
        return found | {"seconds": [round(second, 5) for second in found["seconds"]]}
    except Exception as error:  # whatever a peer leaves behind
        return {"failed": _reason(error)}


def _reason(error: Exception) -> str:
    return first_line(error) if isinstance(error, Failed) else f"{type(error).__name__}: {first_line(error)}"


def failure(runs: list[dict[str, Any]]) -> str:
    """Why the peer has no figures; empty where it has them, or has not run."""
    return str(next((run["failed"] for run in runs if "failed" in run), ""))


def loss_of(arguments: argparse.Namespace, folder: Path, run: dict[str, Any], held: list[Encoded]) -> dict[str, Any]:
    device = {"gpu": "cuda" if nvidia_gpus() else "cpu"}.get(arguments.device, arguments.device)
    try:
        return {"loss": valid_loss(folder, Path(run["adapter"]), held, arguments.rank, device)}
    except Exception as error:
        return {"loss_failed": _reason(error)}


def verdict(runs: dict[str, list[dict[str, Any]]]) -> str:
    """What is wrong with Twintune's runs; empty where nothing is."""
    good = {peer: own[0].get("loss", float("nan")) for peer, own in runs.items() if not failure(own)}
    best = min((loss for peer, loss in good.items() if PEERS[peer] and not math.isnan(loss)), default=float("inf"))
    faults = [f"{peer} failed." for peer, own in runs.items() if not PEERS[peer] and failure(own)]
    for peer, loss in good.items():
        if not PEERS[peer] and not loss <= best + 0.01:
            faults.append(
                f"The validation loss of {peer}, {loss:.4f}, is worse than the best of the others, {best:.4f}."
            )
    return " ".join(faults)


def write(arguments: argparse.Namespace, counts: dict[str, int], runs: dict[str, list[dict[str, Any]]]) -> None:
    if arguments.json:
        given = {name: str(value) for name, value in vars(arguments).items()}
        with atomic_write(arguments.json.absolute()) as temporary:
            temporary.write_text(json.dumps({"arguments": given} | counts | {"runs": runs}, indent=2) + "\n")


def speed_of(tokens: int, seconds: list[float], first: int) -> float:
    """Tokens a second from step `first` on; every step has as many on average."""
    return tokens * (1 - first / len(seconds)) / sum(seconds[first:])


def machine(device: str) -> str:
    if device == "cpu":
        return f"{chip()}, {os.cpu_count()} cores, {platform.system()}, a CPU's figures"
    gpus = nvidia_gpus()
    return f"{gpus[0].name if gpus else 'a GPU'}, {platform.system()}"


def report(arguments: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], tokens: int, labels: int) -> None:
    figures = {peer: _figures(own, tokens) for peer, own in runs.items() if not failure(own)}
    first = next(iter(figures), arguments.peers[0])
    print(
        f"\n{arguments.model}, {Path(arguments.data).name}: {arguments.steps} steps of {arguments.batch} rows, "
        f"{tokens} tokens, {labels} of them labels; rank {arguments.rank}; "
        f"Twintune on torch and trl-best in {arguments.precision}, quantization {arguments.quantization}; "
        f"{arguments.rounds} rounds in turn. {machine(arguments.device)}\n"
    )
    print(
        f"| | tokens/s | {first} is faster by | after the first step | by | steady | by | median step | peak memory "
        "| its share of it | validation loss |"
    )
    print(f"|{' --- |' * 11}")
    for peer, own in runs.items():
        if reason := failure(own):
            print(f"| {peer} | failed: {reason.replace('|', '/')} |{' |' * 9}")
            continue
        speeds, step, peak = figures[peer]
        base_speeds, _, base_peak = figures[first]
        compared = [f"{speed:.1f} | {base / speed:.2f}x" for speed, base in zip(speeds, base_speeds, strict=True)]
        reason = own[0].get("loss_failed", "").replace("|", "/")
        print(
            f"| {peer} | {' | '.join(compared)} | {step:.3f} s | {peak / 1e9:.2f} GB | {base_peak / peak:.2f} "
            f"| {f'failed: {reason}' if reason else format(own[0]['loss'], '.4f')} |"
        )


def _figures(runs: list[dict[str, Any]], tokens: int) -> tuple[list[float], float, float]:
    """`(tokens/s of all steps, after the first one, of the second half; median step; peak)`"""
    halfway = len(runs[0]["seconds"]) // 2
    speeds = [statistics.median(speed_of(tokens, r["seconds"], first) for r in runs) for first in (0, 1, halfway)]
    step = statistics.median(second for r in runs for second in r["seconds"][1:])
    return speeds, step, statistics.median(r["peak"] for r in runs)


if __name__ == "__main__":
    main()

"""Twintune against its peers on the same rows, the same LoRA, the same machine, in one run; prints Markdown and JSON.

    python -m benchmarks.peers                                   # SmolLM2-135M on rows of the built-in example
    python -m benchmarks.peers --data wikisql.jsonl --model google/gemma-3-270m

Each peer has an environment of its own in the user's cache, made once. Everyone sees the same rows once, in steps of
the same size; runs go in turn, A B C A B C. tokens/s: real tokens of those rows over the time of all steps but the
first; peak: the resident set of the whole process, as the system counts it for everyone. The validation loss after
equal data is computed by Twintune for every adapter alike; exits with status 1 where Twintune's is worse than a peer's
by more than 0.01. `twintune-lean` is the torch backend with gradient checkpointing.

    python -m benchmarks.peers --device cuda --peers twintune-torch trl trl-best unsloth

On a GPU the peak is what torch's allocator had given out at the most.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from ctypes.util import find_library
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.load import read_rows
from common.data.truncation import encode_all
from common.models.adapter_files import read_any
from common.models.lora_init import layer_count
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.system.cache import cache_folder
from common.system.environment import chip
from common.system.hardware import choose_precision, nvidia_gpu
from common.training.loop import evaluate

ROOT = Path(__file__).resolve().parent.parent
INSTALL = {
    "trl": ["torch==2.13.0", "trl==1.16.0", "peft", "datasets", *(["liger-kernel"] if nvidia_gpu() else [])],
    "mlx-lm": ["mlx[cpu]>=0.32.4,<0.33", "mlx-lm>=0.32.2,<0.33"],
    "llamafactory": ["torch==2.13.0", "llamafactory==0.9.5"],
    "unsloth": ["unsloth==2026.10.9"],
}
PEERS = {
    "twintune-torch": None,
    "twintune-mlx": None,
    "twintune-lean": None,
    "mlx_lm.lora": "mlx-lm",
    "trl": "trl",
    "trl-best": "trl",
    "padded": "trl",
    "llamafactory": "llamafactory",
    "unsloth": "unsloth",
    "unsloth-lean": "unsloth",
}


def environment(name: str) -> Path:
    """The Python of the peer's own environment, made where it is not there."""
    folder = cache_folder() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in INSTALL[name]:
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
        (folder / "ready").touch()
    return python


def run(command: list[str], **variables: str) -> tuple[str, int]:
    """What the command printed, and the peak of its resident set in bytes."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=printed, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (printed, errors):
            stream.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command[:6])} ...:\n{printed.read()[-1500:]}\n{errors.read()[-3000:]}")
        return printed.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def twintune(job: dict[str, Any]) -> dict[str, Any]:
    output = Path(job["output"])
    options = ["--steps", str(job["steps"]), "--batch-size", str(job["batch"]), "--rank", str(job["rank"])]
    options += ["--alpha", str(2 * job["rank"]), "--learning-rate", str(job["learning_rate"]), "--schedule", "constant"]
    options += ["--warmup", "0", "--valid-share", "0", "--export", "none", "--train-on", "assistant", "--quiet"]
    options += ["--backend", "mlx" if job["peer"] == "twintune-mlx" else "torch", "--output", str(output)]
    if job["peer"] != "twintune-mlx":
        options += ["--precision", job["precision"], "--device", job["device"]]
    options += ["--gradient-checkpointing"] if job["peer"] == "twintune-lean" else []
    _, peak = run([sys.executable, "cli.py", "train", "--model", job["model"], "--data", job["rows"], *options])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((output / "run.json").read_text())
    return {
        "seconds": [line["seconds"] for line in lines if "seconds" in line],
        "peak": record["peak_memory_bytes"] if job["device"] == "cuda" else peak,
        "adapter": str(output / "adapter"),
        "estimated": record["predicted_peak_bytes"],
        "counted": record["peak_memory_bytes"],
    }


def mlx_lm(job: dict[str, Any]) -> dict[str, Any]:
    output = Path(job["output"])
    output.mkdir(parents=True)
    text = Path(job["rows"]).read_text(encoding="utf-8")
    for name in ("train", "valid"):
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    masks = '"text"' not in text[:10]
    config = {
        "model": job["model"],
        "train": True,
        "data": str(output),
        "adapter_path": str(output / "adapter"),
        "iters": job["steps"],
        "batch_size": job["batch"],
        "num_layers": -1,
        "learning_rate": job["learning_rate"],
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"bias_correction": True}},  # off by default: its first steps would be longer
        "mask_prompt": masks,
        "steps_per_report": 1,
        "steps_per_eval": 10**6,
        "val_batches": 0,
        "save_every": 10**6,
        "max_seq_length": 1024,
        "seed": 0,
        "lora_parameters": {"rank": job["rank"], "scale": 2.0, "dropout": 0.0},
    }
    (output / "config.json").write_text(json.dumps(config))  # JSON is YAML
    code = (
        "import json, sys, time; import mlx_lm.lora as lora\n"
        "from mlx_lm.tuner.callbacks import TrainingCallback; marks = []\n"
        "class Clock(TrainingCallback):\n"
        "    def on_train_loss_report(self, info): marks.append(time.perf_counter())\n"
        "lora.get_reporting_callbacks = lambda *a, **k: Clock()\n"
        "sys.argv = ['mlx_lm.lora', '-c', sys.argv[1]]; lora.main()\n"
        "print(json.dumps(marks))"
    )
    blas = find_library("openblas")
    preload = {"LD_PRELOAD": blas} if blas and sys.platform == "linux" else {}
    printed, peak = run([str(environment("mlx-lm")), "-c", code, str(output / "config.json")], **preload)
    ends = json.loads(printed.splitlines()[-1])
    seconds = [0.0, *(after - before for before, after in pairwise(ends))]  # where the first began is not known
    return {"seconds": seconds, "peak": peak, "adapter": str(output / "adapter")}


def hugging_face(job: dict[str, Any]) -> dict[str, Any]:
    printed, peak = run([str(environment("trl")), str(ROOT / "benchmarks" / "peer_hf.py"), json.dumps(job)])
    found = json.loads(printed.splitlines()[-1])
    return {"seconds": found["seconds"], "peak": found["peak"] or peak, "adapter": job["output"]}


def unsloth(job: dict[str, Any]) -> dict[str, Any]:
    job = job | {"checkpointing": "unsloth" if job["peer"] == "unsloth-lean" else False}
    printed, _ = run([str(environment("unsloth")), str(ROOT / "benchmarks" / "peer_unsloth.py"), json.dumps(job)])
    found = json.loads(printed.splitlines()[-1])
    return {"seconds": found["seconds"], "peak": found["peak"], "adapter": job["output"]}


def llama_factory(job: dict[str, Any]) -> dict[str, Any]:
    output = Path(job["output"])
    output.mkdir(parents=True)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    plain = "text" in rows[0]
    (output / "rows.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry: dict[str, Any] = {"file_name": "rows.json", "columns": {"prompt": "text"}}
    if not plain:
        entry = {
            "file_name": "rows.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags | {"system_tag": "system"},
        }
    (output / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    config = {
        "stage": "pt" if plain else "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "lora",
        "lora_rank": job["rank"],
        "lora_alpha": 2 * job["rank"],
        "lora_target": "all",
        "dataset_dir": str(output),
        "dataset": "rows",
        "template": "chatml",
        "packing": False,
        "cutoff_len": 1024,
        "output_dir": str(output / "adapter"),
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
    }
    (output / "config.yaml").write_text(json.dumps(config))
    code = (
        "import json, sys, time; from transformers import TrainerCallback; marks = []\n"
        "class Clock(TrainerCallback):\n"
        "    def on_step_begin(self, *a, **k): marks.append(time.perf_counter())\n"
        "    def on_train_end(self, *a, **k): marks.append(time.perf_counter())\n"
        "from llamafactory.train.tuner import run_exp\n"
        "run_exp(json.load(open(sys.argv[1])), callbacks=[Clock()])\n"
        "print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))"
    )
    command = [str(environment("llamafactory")), "-c", code, str(output / "config.yaml")]
    printed, peak = run(command, DISABLE_VERSION_CHECK="1")
    return {"seconds": json.loads(printed.splitlines()[-1]), "peak": peak, "adapter": str(output / "adapter")}


RUNNERS = {
    "twintune-torch": twintune,
    "twintune-mlx": twintune,
    "twintune-lean": twintune,
    "mlx_lm.lora": mlx_lm,
    "trl": hugging_face,
    "trl-best": hugging_face,
    "padded": hugging_face,
    "llamafactory": llama_factory,
    "unsloth": unsloth,
    "unsloth-lean": unsloth,
}


def valid_loss(folder: Path, adapter: Path, rows: list[Encoded], rank: int, device: str) -> float:
    """By Twintune's torch backend in float32, for every adapter alike."""
    import importlib

    from benchmarks.one_step import recipe_of
    from common.recipe import Plan

    found = read_any(adapter, layer_count(linear_shapes(ModelFolder(folder), ["all-linear"])))
    backend = importlib.import_module("torch_backend").create()
    plan = Plan(backend="torch", device=device, micro_batch_tokens=1024, save_every=1)
    backend.load(recipe_of({"rows": 4, "width": 8, "precision": "fp32", "rank": rank}), plan, folder, found)
    loss = evaluate(backend, rows, 1024, device)
    backend.close()
    return loss


def prepare(arguments: argparse.Namespace, folder: Path, work: Path) -> tuple[list[Encoded], list[Encoded]]:
    """The rows of every run, as each peer reads them; `(training rows, rows held out)` in tokens."""
    lines = Path(arguments.data).read_text(encoding="utf-8").splitlines()
    count = arguments.steps * arguments.batch
    held = lines[count : count + 40]
    (work / "rows.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    (work / "held.jsonl").write_text("\n".join(held) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in lines[:count]]
    split = [
        row if "text" in row else {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows
    ]
    (work / "split.jsonl").write_text("\n".join(map(json.dumps, split)) + "\n", encoding="utf-8")
    encoder = Encoder(load_tokenizer(folder, None), MaskingOptions())
    read = [encode_all(read_rows(work / name), encoder) for name in ("rows.jsonl", "held.jsonl")]
    return read[0], read[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=str(ROOT / "examples" / "data" / "train.jsonl"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
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
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    gpu = {"twintune-torch", "twintune-lean", "trl", "trl-best", "padded", "unsloth", "unsloth-lean"}
    if arguments.peers is None:
        arguments.peers = [p for p in RUNNERS if (p in gpu if arguments.device == "cuda" else "unsloth" not in p)]
    arguments.precision = arguments.precision or choose_precision("auto", "torch", arguments.device).value
    for name in {PEERS[peer] for peer in arguments.peers} - {None}:
        environment(str(name))
    folder = resolve(arguments.model, lambda text: print(text, file=sys.stderr)).path
    results: dict[str, list[dict[str, Any]]] = {peer: [] for peer in arguments.peers}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows, held = prepare(arguments, folder, work)
        for turn in range(arguments.rounds):
            for peer in arguments.peers:
                output = str(work / f"{peer}-{turn}")
                job = vars(arguments) | {"peer": peer, "model": str(folder), "output": output, "json": None}
                result = RUNNERS[peer](job | {"rows": str(work / "rows.jsonl"), "data": str(work / "split.jsonl")})
                results[peer].append(result)
                print(
                    f"{peer}, round {turn + 1}: {statistics.median(result['seconds'][1:]):.2f} s/step", file=sys.stderr
                )
        for runs in results.values():  # after all runs: Linux counts a parent's peak as its later children's too
            runs[0]["loss"] = valid_loss(folder, Path(runs[0]["adapter"]), held, arguments.rank, arguments.device)
    tokens = sum(len(row.ids) - 1 for row in rows)
    report(arguments, results, tokens, sum(row.label_tokens for row in rows))
    losses = {peer: runs[0]["loss"] for peer, runs in results.items()}
    best = min((loss for peer, loss in losses.items() if PEERS[peer]), default=float("inf"))
    worse = [peer for peer, loss in losses.items() if not PEERS[peer] and loss > best + 0.01]
    if worse:
        raise SystemExit(f"The validation loss of {', '.join(worse)} is worse than the best of the others, {best:.4f}.")


def machine(device: str) -> str:
    if device == "cpu":
        return f"{chip()}, {os.cpu_count()} cores, {platform.system()}, a CPU's figures"
    gpu = nvidia_gpu()
    return f"{gpu.name if gpu else 'a GPU'}, {platform.system()}"


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]], tokens: int, labels: int) -> None:
    figures = {}
    for peer, runs in results.items():
        speeds = [tokens * (1 - 1 / len(r["seconds"])) / sum(r["seconds"][1:]) for r in runs]
        step = statistics.median(second for r in runs for second in r["seconds"][1:])
        figures[peer] = (statistics.median(speeds), step, statistics.median(r["peak"] for r in runs), runs[0]["loss"])
    base = figures[arguments.peers[0]]
    print(
        f"{arguments.model}, {Path(arguments.data).name}: {arguments.steps} steps of {arguments.batch} rows, "
        f"{tokens} tokens, {labels} of them labels; rank {arguments.rank}; "
        f"Twintune on torch and trl-best in {arguments.precision}; {arguments.rounds} rounds in turn. "
        f"{machine(arguments.device)}\n"
    )
    first = arguments.peers[0]
    print(f"| | tokens/s | {first} is faster by | median step | peak memory | its share of it | validation loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for peer, (speed, step, peak, loss) in figures.items():
        print(
            f"| {peer} | {speed:.1f} | {base[0] / speed:.2f}x | {step:.3f} s | {peak / 1e9:.2f} GB | "
            f"{base[2] / peak:.2f} | {loss:.4f} |"
        )
    if arguments.json:
        content = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "tokens": tokens, "runs": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

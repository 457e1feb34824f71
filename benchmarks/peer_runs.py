"""One run of each peer with its own Python: its command, and the figures that it printed."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
from ctypes.util import find_library
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peer_environments import PEERS, Failed, last_line
from mlx_backend.blas import better_core

ROOT = Path(__file__).resolve().parent.parent
# That run on CUDA; on MLX's GPU, be it Apple's or NVIDIA's; on a CPU.
RUN_ON = {
    "cuda": ("twintune-torch", "twintune-lean", "trl", "trl-best", "padded", "unsloth", "unsloth-lean"),
    "gpu": ("twintune-mlx", "mlx_lm.lora"),
    "cpu": tuple(peer for peer in PEERS if "unsloth" not in peer),
}
QUANTIZED = ("twintune-torch", "twintune-lean", "unsloth", "unsloth-lean")  # that take --quantization


def run(command: list[str], limit: float, **variables: str) -> tuple[str, int]:
    """What the command printed, and the peak of its resident set in bytes. Raises Failed, after `limit` seconds too."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=printed, stderr=errors)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), _kill(process.pid)))
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (printed, errors):
            stream.seek(0)
        if process.returncode:
            text = errors.read()
            shown = f"{' '.join(command[:6])} ...:\n{printed.read()[-1500:]}\n{text[-3000:]}"
            print(shown, file=sys.stderr, flush=True)
            died = f"status {process.returncode}: {last_line(text)}"
            raise Failed(f"not done in {limit:.0f} s" if late.is_set() else died)
        return printed.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kill(pid: int) -> None:
    """With all that it has started. It stays in this process's group, so that who stops that stops it too."""
    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.NoSuchProcess:
        pass


def twintune(job: dict[str, Any]) -> dict[str, Any]:
    output = Path(job["output"])
    options = ["--steps", str(job["steps"]), "--batch-size", str(job["batch"]), "--rank", str(job["rank"])]
    options += ["--alpha", str(2 * job["rank"]), "--learning-rate", str(job["learning_rate"]), "--schedule", "constant"]
    options += ["--warmup", "0", "--valid-share", "0", "--export", "none", "--train-on", "last", "--quiet"]
    options += ["--backend", "mlx" if job["peer"] == "twintune-mlx" else "torch", "--output", str(output)]
    options += ["--device", job["device"]]
    options += ["--precision", job["precision"]] if job["peer"] != "twintune-mlx" else []
    options += ["--gradient-checkpointing"] if job["peer"] == "twintune-lean" else []
    options += ["--quantization", "4bit"] if job["quantization"] == "nf4" else []
    command = [sys.executable, "cli.py", "train", "--model", job["model"], "--data", job["rows"], *options]
    variables = {"TWINTUNE_LEARN_MEMORY": "0"}  # nothing of this machine's other runs
    _, peak = run(command, job["limit"], **variables, **_cold(output))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((output / "run.json").read_text())
    return {
        "seconds": [line["seconds"] for line in lines if "seconds" in line],
        "peak": peak if job["device"] == "cpu" else record["peak_memory_bytes"],
        "adapter": str(output / "adapter"),
        "estimated": record["predicted_peak_bytes"],
        "counted": record["peak_memory_bytes"],
    }


def _cold(output: Path) -> dict[str, str]:
    """Variables by which MLX finds none of the CUDA kernels that earlier runs have compiled."""
    return {"MLX_PTX_CACHE_DIR": f"{output}-kernels"}


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
        "import json, sys, time; import mlx.core as mx; import mlx_lm.lora as lora\n"
        f"mx.set_default_device(mx.{job['device']})\n"
        "from mlx_lm.tuner.callbacks import TrainingCallback; marks = []\n"
        "class Clock(TrainingCallback):\n"
        "    def on_train_loss_report(self, info): marks.append(time.perf_counter())\n"
        "lora.get_reporting_callbacks = lambda *a, **k: Clock()\n"
        "train = lora.train\n"
        "lora.train = lambda *a, **k: (marks.append(time.perf_counter()), train(*a, **k))[1]\n"
        "sys.argv = ['mlx_lm.lora', '-c', sys.argv[1]]; lora.main()\n"
        "print(json.dumps([marks, mx.get_peak_memory()]))"
    )
    blas = find_library("openblas") if job["device"] == "cpu" and sys.platform == "linux" else None
    variables = _cold(output) | ({"LD_PRELOAD": blas} if blas else {})
    if blas and (core := better_core(ctypes.CDLL(blas))):  # as Twintune has it where OpenBLAS is older than the CPU
        variables["OPENBLAS_CORETYPE"] = core
    command = [job["python"], "-c", code, str(output / "config.json")]
    printed, peak = run(command, job["limit"], **variables)
    marks, allocated = json.loads(printed.splitlines()[-1])
    seconds = [after - before for before, after in pairwise(marks)]
    return {
        "seconds": seconds,
        "peak": peak if job["device"] == "cpu" else allocated,
        "adapter": str(output / "adapter"),
    }


def hugging_face(job: dict[str, Any]) -> dict[str, Any]:
    command = [job["python"], str(ROOT / "benchmarks" / "peer_hf.py"), json.dumps(job)]
    printed, peak = run(command, job["limit"])
    found = json.loads(printed.splitlines()[-1])
    return {"seconds": found["seconds"], "peak": found["peak"] or peak, "adapter": job["output"]}


def unsloth(job: dict[str, Any]) -> dict[str, Any]:
    job = job | {"checkpointing": "unsloth" if job["peer"] == "unsloth-lean" else False}
    command = [job["python"], str(ROOT / "benchmarks" / "peer_unsloth.py"), json.dumps(job)]
    printed, _ = run(command, job["limit"])
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
    command = [job["python"], "-c", code, str(output / "config.yaml")]
    printed, peak = run(command, job["limit"], DISABLE_VERSION_CHECK="1")
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

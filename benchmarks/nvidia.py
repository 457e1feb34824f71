"""What only an NVIDIA GPU can tell, in calls of ten minutes; writes one JSON file, after every command.

    python -m benchmarks.nvidia --out nvidia-report.json
    python -m benchmarks.nvidia --only mlx memory             # stages whose name contains one of the words
    python -m benchmarks.nvidia --commit 4f2636b              # of a copy that git does not know
    python -m benchmarks.nvidia --device cpu --steps 4        # elsewhere, to see that the stages run

Some six calls with the same file should do all: what an earlier one has done at this commit on this machine is left
out, and what a peer is missing in comes again. A stage has its own time limit, and what it had printed by then is kept;
one that the time does not allow is not begun. MLX begins with an empty kernel
cache. Rows are those of `benchmarks.regret_data`, chat-like or mixed. Models other than SmolLM2 have its tokenizer and
random weights, and are written by their stage. Exits with status 1 where a stage failed.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.random_model import folder_of
from benchmarks.stages import Stages, hidden_paths, run_stages

_MLX = ("twintune-mlx", "mlx_lm.lora")
_TORCH = ("twintune-torch", "unsloth", "trl-best", "twintune-lean", "unsloth-lean")
_TOKENS = (["--rows", "16", "--tokens", "400", "624"], ["--rows", "8", "--tokens", "250", "500"])  # 8,192 and 3,000
_BATCHES = ("16", "42")  # chat-like rows of about 3,100 and 8,200 tokens
LIMITS = {  # seconds, in the order of the stages' worth
    "parity": 90,
    "mlx: smollm2": 240,
    "graphs: qwen3-4b": 200,
    "torch: smollm2": 330,
    "mlx: qwen3-0.6b": 240,
    "mlx: gemma-3-1b": 240,
    "mlx: gemma-3-270m": 240,
    "mlx: mixed": 300,
    "torch: qwen3-4b": 330,
    "first steps: qwen3-4b": 150,
    "nf4: qwen3-4b": 180,
    "memory": 150,
    "profile: qwen3-4b": 240,
    "graphs: smollm2": 60,
}


def stages(device: str, steps: int, data: str, folder: Path) -> Stages:
    """By name, the arguments of the commands that a stage runs. folder: of what peers write by --json."""
    mlx, cuda = ("cpu", "cpu") if device == "cpu" else ("gpu", "cuda")

    def compared(name: str, model: str, count: int, rows: int, peers: Sequence[str], *options: str) -> list[str]:
        """Of a stage: `count` steps of so many rows by each peer."""
        sizes = ["--steps", str(max(2, count)), "--batch", str(rows), "--rank", "16", "--rounds", "1"]
        sizes += ["--limit", str(LIMITS[name] * 3 // 2 // max(2, len(peers)))]  # so that one that hangs leaves time
        where = ["--model", model, "--device", mlx if peers == _MLX else cuda]
        report = ["--json", str(folder / f"{name.replace(': ', '-')}.json")]
        return ["-m", "benchmarks.peers", *where, *sizes, "--peers", *peers, *report, *(options or ("--data", data))]

    smol, large = "HuggingFaceTB/SmolLM2-135M-Instruct", str(folder_of("qwen3-4b"))
    found = {
        "parity": [["cli.py", "doctor", "--parity", model] for model in ("llama", "gemma3_text", smol)],
        "mlx: smollm2": [compared("mlx: smollm2", smol, steps, 8, _MLX)],
        "torch: smollm2": [compared("torch: smollm2", smol, steps // 2, 8, _TORCH if cuda == "cuda" else _TORCH[:1])],
        "mlx: mixed": [compared("mlx: mixed", smol, steps // 2, 8, _MLX, "--data", "mixed")],
    }
    if device == "cpu":
        return found
    for name in ("qwen3-0.6b", "gemma-3-1b", "gemma-3-270m"):
        own = compared(f"mlx: {name}", str(folder_of(name)), steps, 8, _MLX)
        found[f"mlx: {name}"] = [["-m", "benchmarks.random_model", name], own]
    for name, model in (("graphs: qwen3-4b", "qwen3-4b"), ("graphs: smollm2", "smollm2-135m")):
        found[name] = [["-m", "benchmarks.graphs", "--model", model, *tokens] for tokens in _TOKENS]
    found["memory"] = [
        ["-m", "benchmarks.memory", "--device", "gpu", "--only", "smollm2", "gemma-3-1b"],
        ["-m", "benchmarks.memory", "--device", "cuda", "--only", "gemma-3-1b"],
    ]
    profiled = ["-m", "benchmarks.step_time", "--model", large, "--device", "cuda", "--precision", "bf16"]
    nf4 = ("--data", data, "--quantization", "nf4")
    on_large = {
        "torch: qwen3-4b": [compared("torch: qwen3-4b", large, steps // 10, 16, _TORCH)],
        "first steps: qwen3-4b": [compared("first steps: qwen3-4b", large, steps // 2, 16, _TORCH[:1])],
        "nf4: qwen3-4b": [compared("nf4: qwen3-4b", large, steps // 10, 16, _TORCH[:2], *nf4)],
        "profile: qwen3-4b": [
            *([*profiled, "--batch", batch] for batch in _BATCHES),
            *([*profiled, "--batch", _BATCHES[0], "--layers", layers] for layers in ("torch", "compiled")),
        ],
    }
    found |= {name: [["-m", "benchmarks.random_model", "qwen3-4b"], *own] for name, own in on_large.items()}
    return {name: found[name] for name in LIMITS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the stages to run, such as mlx or smollm2")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--data", default="chat-like", help="chat rows of your own in place of the chat-like ones")
    parser.add_argument("--commit", default="", help="where git cannot tell it")
    parser.add_argument("--out", type=Path, default=Path("nvidia-report.json"))
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps: at least 2, because the first one is slower.")
    with tempfile.TemporaryDirectory() as folder:
        every = stages(given.device, given.steps, given.data, Path(folder))
        chosen = {name: commands for name, commands in every.items() if any(word in name for word in given.only)}
        hidden = hidden_paths() | {folder: "FOLDER"}
        good = run_stages(chosen, given.out, hidden, given.commit, given.minutes, LIMITS)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

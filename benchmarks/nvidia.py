"""What only an NVIDIA GPU can tell, in one command of ten minutes; writes one JSON file.

    python -m benchmarks.nvidia --out nvidia-report.json
    python -m benchmarks.nvidia --only torch --minutes 30     # stages whose name contains the word
    python -m benchmarks.nvidia --device cpu --steps 4        # elsewhere, to see that the stages run

The stages stand in the order of their worth: MLX beside mlx-lm from an empty kernel cache, torch beside Unsloth and
TRL, then memory, nf4 and steps of 3,000 and 8,192 tokens with CUDA graphs and without. A stage that the time does not
allow is noted as not begun. Models other than SmolLM2 have its tokenizer and random weights, and are written by their
stage. Exits with status 1 where a stage failed.
"""

import argparse
from pathlib import Path

from benchmarks.random_model import folder_of
from benchmarks.stages import Stages, hidden_paths, run_stages

_SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MLX = ("gemma-3-270m", "qwen3-0.6b", "gemma-3-1b")
_PEERS = ["--peers", "twintune-torch", "unsloth", "trl-best", "twintune-lean", "unsloth-lean"]
_NF4 = ["--quantization", "nf4", "--peers", "twintune-torch", "unsloth"]
_TOKENS = (["--rows", "8", "--tokens", "250", "500"], ["--rows", "16", "--tokens", "400", "624"])  # on average


def stages(device: str, steps: int, data: list[str]) -> Stages:
    mlx, cuda = ("cpu", "cpu") if device == "cpu" else ("gpu", "cuda")
    on_mlx = _peers(mlx, steps, 8, data) + (["--peers", "twintune-mlx", "mlx_lm.lora"] if mlx == "cpu" else [])
    on_torch = _peers(cuda, max(2, steps // 2), 8, data) + (_PEERS if cuda == "cuda" else _PEERS[:2])
    large = _peers(cuda, max(2, steps // 10), 16, data)
    found = {"mlx: smollm2": [[*on_mlx, "--model", _SMOL]], "torch: smollm2": [[*on_torch, "--model", _SMOL]]}
    found |= {f"mlx: {name}": _with_random(name, on_mlx) for name in _MLX}
    if device == "cpu":
        return found
    found["torch: qwen3-4b"] = _with_random("qwen3-4b", large + _PEERS)
    found["memory: mlx"] = [["-m", "benchmarks.memory", "--device", "gpu"]]
    found["memory: torch"] = [["-m", "benchmarks.memory", "--device", "cuda"]]
    found["nf4: torch"] = _with_random("qwen3-4b", large + _NF4)
    found["graphs: torch"] = [["-m", "benchmarks.graphs", *tokens] for tokens in _TOKENS]
    found["graphs: qwen3-4b"] = [["-m", "benchmarks.graphs", "--model", "qwen3-4b", *tokens] for tokens in _TOKENS]
    return found


def _peers(device: str, steps: int, batch: int, data: list[str]) -> list[str]:
    sizes = ["--steps", str(steps), "--batch", str(batch), "--rank", "16", "--rounds", "1"]
    return ["-m", "benchmarks.peers", "--device", device, *sizes, *data]


def _with_random(name: str, peers: list[str]) -> list[list[str]]:
    """The commands that write the model with random weights, and measure with it."""
    return [["-m", "benchmarks.random_model", name], [*peers, "--model", str(folder_of(name))]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the stages to run, such as mlx or smollm2")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--data", type=Path, help="chat rows; by default the built-in example's")
    parser.add_argument("--out", type=Path, default=Path("nvidia-report.json"))
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps: at least 2, because the first one is slower.")
    data = ["--data", str(given.data)] if given.data else []
    chosen = {name: c for name, c in stages(given.device, given.steps, data).items() if given.only in name}
    if not run_stages(chosen, given.out, hidden_paths(), given.minutes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""What only an NVIDIA GPU can tell, in one command of ten minutes; writes one JSON file.

    python -m benchmarks.nvidia --out nvidia-report.json
    python -m benchmarks.nvidia --only torch --minutes 30     # stages whose name contains the word
    python -m benchmarks.nvidia --device cpu --steps 4        # elsewhere, to see that the stages run

The stages stand in the order of their worth: MLX beside mlx-lm from an empty kernel cache, torch beside Unsloth and
TRL, then memory and CUDA graphs. A stage that the time does not allow is noted as not begun. Models other than
SmolLM2 have its tokenizer and random weights.
"""

import argparse
import shutil
from pathlib import Path

from benchmarks.random_model import random_model
from benchmarks.stages import Stages, run_stages
from common.models.resolve import resolve

_SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_MLX = ("gemma-3-270m", "qwen3-0.6b", "gemma-3-1b")
_PEERS = ["--peers", "twintune-torch", "unsloth", "trl-best"]


def stages(device: str, steps: int, data: list[str]) -> Stages:
    mlx, cuda = ("cpu", "cpu") if device == "cpu" else ("gpu", "cuda")
    on_mlx = _peers(mlx, steps, 8, data) + (["--peers", "twintune-mlx", "mlx_lm.lora"] if mlx == "cpu" else [])
    on_torch = _peers(cuda, steps // 2, 8, data) + (_PEERS if cuda == "cuda" else ["--peers", "twintune-torch"])
    large = _peers(cuda, max(1, steps // 10), 16, data) + on_torch[on_torch.index("--peers") :]
    found = {"mlx: smollm2": [[*on_mlx, "--model", _SMOL]], "torch: smollm2": [[*on_torch, "--model", _SMOL]]}
    found |= {f"mlx: {name}": [[*on_mlx, "--model", str(_with_tokenizer(name))]] for name in _MLX}
    if device == "cpu":
        return found
    found["torch: qwen3-4b"] = [[*large, "--model", str(_with_tokenizer("qwen3-4b"))]]
    found["memory: mlx"] = [["-m", "benchmarks.memory", "--device", "gpu"]]
    found["memory: torch"] = [["-m", "benchmarks.memory", "--device", "cuda"]]
    found["graphs: torch"] = [["-m", "benchmarks.graphs"]]
    return found


def _peers(device: str, steps: int, batch: int, data: list[str]) -> list[str]:
    sizes = ["--steps", str(steps), "--batch", str(batch), "--rank", "16", "--rounds", "1"]
    return ["-m", "benchmarks.peers", "--device", device, *sizes, *data]


def _with_tokenizer(name: str) -> Path:
    """The model with random weights, and SmolLM2's tokenizer beside them, whose ids it all knows."""
    folder, source = random_model(name), resolve(_SMOL, print).path
    for file in (*source.glob("tokenizer*"), *source.glob("*.jinja"), *source.glob("*tokens*.json")):
        shutil.copyfile(file, folder / file.name)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the stages to run, such as mlx or smollm2")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--data", type=Path, help="chat rows; by default the built-in example's")
    parser.add_argument("--out", type=Path, default=Path("nvidia-report.json"))
    given = parser.parse_args()
    data = ["--data", str(given.data)] if given.data else []
    chosen = {name: c for name, c in stages(given.device, given.steps, data).items() if given.only in name}
    run_stages(chosen, given.out, {str(Path.home()): "~"}, given.minutes)


if __name__ == "__main__":
    main()

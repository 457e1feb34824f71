"""All that only a Mac can tell, in one command; writes one JSON file to send back.

    python -m benchmarks.mac                    # every stage
    python -m benchmarks.mac --only peers       # one of: facts tests parity example peers memory sizes
    python -m benchmarks.mac --device cpu       # elsewhere, to see that the stages run

Each stage is commands of this repository with their output; one that fails is noted, and the next begins. A second call
runs what the file says is not done yet. docs/metal.md says what to look at. Exits with status 1 where a stage failed.
The file holds no environment variable, and in place of the paths of the user's folder, the checkout, the cache and
CMake it has words.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from benchmarks.stages import Stages, hidden_paths, run_stages

_SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SHAPE = {"backend": "mlx", "precision": "bf16", "rows": 4, "width": 256, "steps": 3}
_SIZES = [
    {"model": "gemma-3-1b"},
    {"model": "gemma-3-1b", "gradient_checkpointing": True},
    {"model": "gemma-3-4b", "gradient_checkpointing": True},
    {"model": "gemma-3-4b", "gradient_checkpointing": True, "quantization": "mlx-4bit-64"},
]


def stages(device: str, folder: Path) -> Stages:
    """By name, the arguments of the commands that a stage runs."""
    train = ["cli.py", "train", "--backend", "mlx", "--device", device, "--output", str(folder / "example")]
    step = ["-m", "benchmarks.one_step"]
    peers = ["-m", "benchmarks.peers", "--device", device, "--steps", "200", "--batch", "8", "--rounds", "1"]
    peers += ["--peers", "twintune-mlx", "mlx_lm.lora"]
    return {
        # on a GPU this has max_recommended_working_set_size
        "facts": [["cli.py", "doctor"], ["-c", f"import mlx.core as mx; print(mx.device_info(mx.{device}))"]],
        "tests": [["-m", "pytest", "-q", "tests/mlx", "tests/parity"]],
        "parity": [["cli.py", "doctor", "--parity", model] for model in ("llama", "gemma3_text", _SMOL)],
        "example": [train, ["-m", "examples.score", str(folder / "example")]],
        "peers": [[*peers, "--data", data, "--json", str(folder / f"{data}.json")] for data in ("chat-like", "mixed")],
        "memory": [["-m", "benchmarks.memory", "--device", device, "--only", "mlx"]],
        "sizes": [[*step, json.dumps(_SHAPE | case | {"device": device})] for case in _SIZES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(stages("", Path())), help="stages to run")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--out", type=Path, default=Path("mac-report.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wanted = {
            name: commands
            for name, commands in stages(arguments.device, Path(folder)).items()
            if not arguments.only or name in arguments.only
        }
        os.environ["TWINTUNE_TEST_MLX_DEVICE"] = arguments.device  # doctor takes the GPU where there is one
        good = run_stages(wanted, arguments.out, hidden_paths() | {folder: "FOLDER"})
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

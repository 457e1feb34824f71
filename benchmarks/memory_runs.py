"""The memory that whole trainings take, beside the figure that `train` printed before the first step.

    python -m benchmarks.memory_runs [--only WORD] [--learned FILE]

Each case is `train --steps 50` of its own. It runs twice: the second time on other rows, with another batch size, after
the first has taught the estimate. --learned: where what was learned is kept; by default a file for each case, empty
at first. Estimate and peak are run.json's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peer_runs import ROOT
from benchmarks.regret_data import data_set, write_set

_SMOL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_GEMMA = {"model": "google/gemma-3-270m", "chat-template": "gemma"}
_LEAN = {"gradient-checkpointing": ""}
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # name: (the first run's options, those of the second)
    "example fp32": ({**_SMOL, "precision": "fp32"}, {"data": "chat", "batch-size": "4"}),
    "example bf16": ({**_SMOL, "precision": "bf16"}, {"data": "chat", "batch-size": "4"}),
    "chat bf16": ({**_SMOL, "precision": "bf16", "data": "chat"}, {"data": "example", "batch-size": "16"}),
    "gemma bf16 checkpointing": ({**_GEMMA, **_LEAN, "precision": "bf16"}, {"data": "chat", "batch-size": "4"}),
    "gemma fp32 checkpointing": ({**_GEMMA, **_LEAN, "precision": "fp32"}, {"data": "chat", "batch-size": "4"}),
}
_QUICK = {"eval-rows": "8", "eval-every": "25", "sample-prompt": "Hi", "export": "none", "save-every": "1000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the cases to run, such as bf16 or mlx")
    parser.add_argument("--learned", type=Path, help="file of what was learned")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    print("| case | run | estimated GB | measured GB | difference |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("example", "chat"):
            (Path(folder) / name).mkdir()
            write_set(data_set(name, None), Path(folder) / name)
        for backend in ("torch", "mlx"):
            for name, (first, second) in CASES.items():
                if given.only in f"{backend} {name}":
                    learned = given.learned or Path(folder) / f"{backend} {name}.jsonl"
                    _case(f"{backend} {name}", backend, first, second, Path(folder), learned, given.steps)


def _case(
    name: str, backend: str, first: dict[str, str], second: dict[str, str], folder: Path, learned: Path, steps: int
) -> None:
    base = {"backend": backend, "data": "example", "batch-size": "8", "steps": str(steps), **_QUICK}
    for number, options in enumerate([base | first, base | first | second], 1):
        record = _train(options, folder, learned)
        estimated, peak = record["predicted_peak_bytes"], record["peak_memory_bytes"]
        print(
            f"| {name} | {number}: {options['data']}, {options['batch-size']} rows | {estimated / 1e9:.3f} "
            f"| {peak / 1e9:.3f} | {estimated / peak - 1:+.1%} |",
            flush=True,
        )


def _train(options: dict[str, str], folder: Path, learned: Path) -> dict[str, Any]:
    options = options | {"data": str(folder / options["data"])}
    words = [f"--{name}={value}".removesuffix("=") for name, value in options.items()]
    with tempfile.TemporaryDirectory() as output:
        run = Path(output) / "run"
        command = [sys.executable, str(ROOT / "cli.py"), "train", *words, f"--output={run}", "--quiet"]
        env = os.environ | {"TWINTUNE_LEARN_MEMORY": str(learned)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        return dict(json.loads((run / "run.json").read_text()))


if __name__ == "__main__":
    main()

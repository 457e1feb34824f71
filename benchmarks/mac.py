"""All that only a Mac can tell, in one command; writes one JSON file to send back.

    python -m benchmarks.mac                    # every stage
    python -m benchmarks.mac --only peers       # one of: facts tests example peers memory sizes
    python -m benchmarks.mac --device cpu       # elsewhere, to see that the stages run

Each stage is a command of this repository with its output; one that fails is noted, and the next begins. docs/metal.md
says what to look at. The file holds no user name, no path and no environment variable.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peer_runs import ROOT
from common.system.environment import chip
from common.system.memory import swap_used, total

_KEPT = 20_000  # characters of a stage's output, from its end
_SHAPE = {"backend": "mlx", "precision": "bf16", "rows": 4, "width": 256, "steps": 3}
_SIZES = [
    {"model": "gemma-3-1b"},
    {"model": "gemma-3-1b", "gradient_checkpointing": True},
    {"model": "gemma-3-4b", "gradient_checkpointing": True},
    {"model": "gemma-3-4b", "gradient_checkpointing": True, "quantization": "mlx-4bit-64"},
]


def stages(device: str, folder: Path) -> dict[str, list[list[str]]]:
    """By name, the arguments of the commands that a stage runs."""
    train = ["cli.py", "train", "--backend", "mlx", "--device", device, "--output", str(folder / "example")]
    step = ["-m", "benchmarks.one_step"]
    return {
        "facts": [["cli.py", "doctor"]],
        "tests": [["-m", "pytest", "-q", "tests/mlx", "tests/parity"]],
        "example": [train, ["-m", "examples.score", str(folder / "example")]],
        "peers": [["-m", "benchmarks.peers", "--device", device, "--steps", "200", "--batch", "8", "--rounds", "1"]],
        "memory": [["-m", "benchmarks.memory", "--device", device, "--only", "mlx"]],
        "sizes": [[*step, json.dumps(_SHAPE | case | {"device": device})] for case in _SIZES],
    }


def facts() -> dict[str, Any]:
    """The machine and what is installed on it."""
    installed = {name: version(name) for name in ("mlx", "mlx-lm", "transformers", "twintune")}
    system = {"chip": chip(), "cores": os.cpu_count(), "memory": total(), "system": platform.platform()}
    return system | {"python": platform.python_version(), "commit": _commit(), "installed": installed}


def _commit() -> str:
    """Of the checkout; empty where it is none."""
    head = ROOT / ".git" / "HEAD"
    if not head.is_file():
        return ""
    name = head.read_text(encoding="utf-8").strip().removeprefix("ref: ")
    branch = ROOT / ".git" / name
    return branch.read_text(encoding="utf-8").strip() if branch.is_file() else name


def run(arguments: list[str]) -> dict[str, Any]:
    """What a command printed, its status, its seconds, and how much swap grew meanwhile."""
    started, swap = time.monotonic(), swap_used()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return {
        "command": " ".join(["python", *arguments]),
        "status": done.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "swap_growth": swap_used() - swap,
        "output": done.stdout[-_KEPT:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(stages("", Path())), help="stages to run")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--out", type=Path, default=Path("mac-report.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": facts(), "device": arguments.device, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, commands in stages(arguments.device, Path(folder)).items():
            if arguments.only and name not in arguments.only:
                continue
            print(f"{name} ...", flush=True)
            done = [run(command) for command in commands]
            for result in done:
                result["output"] = result["output"].replace(folder, "FOLDER").replace(str(Path.home()), "~")
                result["command"] = result["command"].replace(folder, "FOLDER")
            report["stages"][name] = done
            arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            for result in done:
                print(f"    {'FAILED' if result['status'] else 'ok'} in {result['seconds']} s", flush=True)
    print(f"Written: {arguments.out}")


if __name__ == "__main__":
    main()

"""The Python of each peer: an environment in the user's cache that is made once, and the versions in it."""

import json
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

from common.system.cache import cache_folder
from common.system.hardware import nvidia_gpus

INSTALL = {
    "trl": ["torch==2.13.0", "trl==1.16.0", "peft", "datasets", *(["liger-kernel"] if nvidia_gpus() else [])],
    "mlx-lm": ["mlx[cpu]>=0.32.4,<0.33", "mlx-lm>=0.32.2,<0.33"],
    "mlx-lm on a GPU": [f"mlx{'[cuda13]' if nvidia_gpus() else ''}>=0.32.4,<0.33", "mlx-lm>=0.32.2,<0.33"],
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
_PACKAGES = (
    *("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth", "bitsandbytes", "llamafactory"),
    *("mlx", "mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm"),
)
_VERSIONS = """import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Failed(Exception):
    """A run without figures, by its reason."""


def environment(peer: str, device: str) -> str:
    """The Python of the peer's own environment, made where it is not there. Raises Failed.

    It is this one for Twintune, and for mlx-lm where this one has it.
    """
    if PEERS[peer] is None:
        return sys.executable
    name = str(PEERS[peer]) + (" on a GPU" if device == "gpu" else "")
    if PEERS[peer] == "mlx-lm" and all(map(_installed, INSTALL[name])):
        return sys.executable
    folder = cache_folder() / "peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _install([sys.executable, "-m", "venv", str(folder)])
        for package in INSTALL[name]:
            _install([str(python), "-m", "pip", "install", "-q", package])
        (folder / "ready").touch()
    return str(python)


def _installed(package: str) -> bool:
    wanted = Requirement(package)
    try:
        return wanted.specifier.contains(metadata.version(wanted.name))
    except metadata.PackageNotFoundError:
        return False


def _install(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"no environment: {command[-1]}: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """That names an error, or the last one."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in reversed(lines) if "Error" in line or "ERROR" in line), lines[-1]).strip()


def versions(python: str) -> dict[str, str]:
    """Of Python and of what decides its speed. Raises Failed."""
    done = subprocess.run([python, "-c", _VERSIONS, *_PACKAGES], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(last_line(done.stderr))
    return dict(json.loads(done.stdout))

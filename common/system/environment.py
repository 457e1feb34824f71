"""What machine and which packages a run was made with."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.files import atomic_write
from common.system.hardware import cores, physical_cores
from common.system.memory import total

PACKAGES = ("torch", "transformers", "peft", "mlx", "mlx-lm", "numpy", "safetensors", "tokenizers", "twintune")
_FILE = "environment.json"


def environment() -> dict[str, Any]:
    """Versions and machine; no names, no paths, no tokens."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": chip(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS") or str(physical_cores()),
        "memory_bytes": total(),
        "packages": versions,
    }


def write_environment(run: Path) -> None:
    with atomic_write(run / _FILE) as temporary:
        temporary.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def environment_changes(run: Path) -> list[str]:
    """Such as `torch 2.12.0 -> 2.13.0`: what has changed, since the run began, of all that may change its rounding."""
    try:
        before, now = _rounding(read_json(run / _FILE, "")), _rounding(environment())
    except (OSError, UserError):
        return []
    return [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


def _rounding(content: dict[str, Any]) -> dict[str, Any]:
    packages = content.get("packages")
    found: dict[str, Any] = dict(packages) if isinstance(packages, dict) else {}
    return found | {name: content[name] for name in ("processor", "threads") if name in content}


def chip() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"

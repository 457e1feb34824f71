"""What machine and which packages a run was made with."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from common.files import atomic_write
from common.system.hardware import cores
from common.system.memory import total

PACKAGES = ("torch", "transformers", "peft", "mlx", "mlx-lm", "numpy", "safetensors", "tokenizers", "twintune")


def write_environment(run: Path) -> None:
    """environment.json: versions and machine; no names, no paths, no tokens."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    content = {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": chip(),
        "cores": cores(),
        "memory_bytes": total(),
        "packages": versions,
    }
    with atomic_write(run / "environment.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def chip() -> str:
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"

"""`doctor`: what is here, and what is missing for which step."""

import argparse
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from common.context import Context
from common.display import Display, gigabytes
from common.errors import UserError
from common.llama_cpp.build import missing_build_tools
from common.llama_cpp.install import find, which
from common.system.cache import cache_folder
from common.system.environment import chip
from common.system.hardware import (
    INSTALL,
    MLX_INSTALL,
    choose_backend,
    choose_device,
    choose_precision,
    nvidia_gpu,
    preload,
)
from common.system.memory import swap_used, total
from common.verify.parity import parity


def doctor(display: Display) -> None:
    """Print two tables: the machine, and each step with what it lacks. The hub token is never printed."""
    import psutil

    gpu = nvidia_gpu()
    cmake = which("cmake")
    display.table(
        "This machine",
        ["", ""],
        [
            ["chip", f"{chip()}, {psutil.cpu_count(logical=False) or os.cpu_count()} cores"],
            ["system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"],
            ["memory", f"{gigabytes(total())}, {gigabytes(psutil.virtual_memory().available)} available"],
            ["swap in use", gigabytes(swap_used())],
            ["NVIDIA GPU", f"{gpu.name}, {gigabytes(gpu.memory)}" if gpu else "none"],
            *[[name, _version(name)] for name in ("torch", "transformers", "peft", "mlx", "mlx-lm")],
            ["CMake", cmake or "none"],
            ["llama.cpp", _llama()],
            ["hub token", "present" if _has_token() else "none (only gated or private models need one)"],
            ["free disk", f"{gigabytes(shutil.disk_usage(Path.cwd()).free)} here"],
            ["cache", str(cache_folder())],
        ],
    )
    rows = []
    for backend in ("torch", "mlx"):
        try:
            choose_backend(backend)
            device = choose_device("auto", backend)
            precision = choose_precision("auto", backend, device.value)
            rows.append(
                [f"train on {backend}", f"ready: {device.value} ({device.why}), {precision.value} ({precision.why})"]
            )
            if backend == "mlx" and device.value == "cpu":
                rows.append(["MLX's products", _blas_line()])
        except UserError as error:
            rows.append([f"train on {backend}", f"missing: {error.what} {error.fix}"])
    try:
        found = find(None)
        broken = ""
    except UserError as error:
        found, broken = None, error.what
    if found or broken:
        rows.append(["make a GGUF", broken or "ready"])
    elif missing := missing_build_tools():
        rows.append(["make a GGUF", "missing: " + "; ".join(missing)])
    else:
        rows.append(["make a GGUF", "llama.cpp will be built once (4 to 10 minutes)"])
    display.table("Steps", ["step", "state"], rows)
    auto = choose_backend("auto")
    display.say(f"--backend auto is {auto.value}: {auto.why}")


def _blas_line() -> str:
    found = preload()
    return f"fast, by {found}" if found else f"about 15 times slower than need be: no OpenBLAS; {INSTALL}"


def _llama() -> str:
    try:
        found = find(None)
    except UserError as error:
        return error.what
    return f"{found.where} ({found.version})" if found else "none"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"none ({MLX_INSTALL.get(sys.platform, 'no build for this system')})" if "mlx" in package else "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parity",
        metavar="MODEL",
        help="train this model a few steps on both backends and compare: a model, or a family such as llama",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    if args.parity is None:
        doctor(context.display)
        return 0
    return 0 if parity(args.parity, context) else 1

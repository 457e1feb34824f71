"""`doctor`: what is here, and what is missing for which step."""

import argparse
import platform
import shutil
from importlib import metadata
from pathlib import Path

from common.context import Context
from common.display import gigabytes
from common.errors import UserError
from common.llama_cpp.build import missing_build_tools
from common.llama_cpp.install import find, which
from common.system.cache import cache_folder
from common.system.cgroup import core_limit, memory_limit
from common.system.environment import chip
from common.system.hardware import Gpu, choose_backend, mlx_install, nvidia_gpus, physical_cores
from common.system.memory import available, physical, swap_used, total
from common.training.learned_memory import observations, summary
from common.verify.parity import parity


def doctor(context: Context) -> None:
    """Print two tables: the machine, and each step with what it lacks. The hub token is never printed."""
    display, gpus = context.display, nvidia_gpus()
    cmake = which("cmake")
    display.table(
        "This machine",
        ["", ""],
        [
            ["chip", _cores()],
            ["system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"],
            ["memory", _memory()],
            ["swap in use", gigabytes(swap_used())],
            ["NVIDIA GPU", "; ".join(map(_gpu, gpus)) or "none"],
            *[[name, _version(name)] for name in ("torch", "transformers", "peft", "mlx", "mlx-lm")],
            ["CMake", cmake or "none"],
            ["llama.cpp", _llama()],
            ["hub token", "present" if _has_token() else "none (only gated or private models need one)"],
            ["free disk", f"{gigabytes(shutil.disk_usage(Path.cwd()).free)} here"],
            ["cache", str(cache_folder())],
            ["memory estimates", summary(observations()) or "nothing learned on this machine yet"],
        ],
    )
    rows = []
    for backend in ("torch", "mlx"):
        try:
            choose_backend(backend, context.backends)
            package = context.backends(backend)
            device = package.choose_device("auto")
            precision = package.choose_precision("auto", device.value)
            state = f"ready: {device.value} ({device.why}), {precision.value} ({precision.why})"
            rows.append([f"train on {backend}", f"{state}. {device.warning}" if device.warning else state])
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
    auto = choose_backend("auto", context.backends)
    display.say(f"--backend auto is {auto.value}: {auto.why}")


def _cores() -> str:
    limit = core_limit()
    limited = f" ({limit.file} allows {limit.amount:g})" if limit else ""
    return f"{chip()}, {physical_cores()} cores{limited}"


def _gpu(gpu: Gpu) -> str:
    return f"{gpu.name}, {'no memory of its own reported' if gpu.memory is None else gigabytes(gpu.memory)}"


def _memory() -> str:
    """The memory that counts, and what limits it to less than the machine has."""
    limit = memory_limit()
    limited = f" (of the machine's {gigabytes(physical())}, by {limit.file})" if limit else ""
    return f"{gigabytes(total())}{limited}, {gigabytes(available())} available"


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
        return f"none ({mlx_install()})" if "mlx" in package else "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parity",
        metavar="MODEL",
        help="train this model a few steps on both backends and compare: a model, or a family such as llama",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    if args.parity is None:
        doctor(context)
        return 0
    return 0 if parity(args.parity, context) else 1

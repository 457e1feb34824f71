"""Find llama.cpp: its converter, `llama-quantize` and `llama-server`; in our own build, two programs to measure by."""

import hashlib
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.errors import UserError
from common.paths import user_path
from common.system.cache import artifact_lock, cache_folder
from common.system.process import capture, not_started, offline_environment

VERSION = "0.3.36"
TARGETS = ("llama-quantize", "llama-server")
OURS = ("llama-imatrix", "twintune-logits")  # what our own build has besides; the second is from logits_tool/
LOGITS = Path(__file__).with_name("logits_tool")
CONVERTER = "convert_hf_to_gguf.py"
OF_ANOTHER_CPU = (  # remedy where it ended by SIGILL
    "This CPU refuses an instruction of this llama.cpp. Build it here: python cli.py llama clean, then "
    "python cli.py llama build; or name another: --llama-cpp DIR."
)

_EXE = ".exe" if os.name == "nt" else ""


@dataclass(frozen=True)
class LlamaCpp:
    """A usable llama.cpp. `where` says how it was found; `version` is what it reports.

    imatrix: `llama-imatrix`, where there is one. logits: our own tool, which only our own build has.
    """

    converter: Path
    quantize: Path
    server: Path
    where: str
    version: str
    imatrix: Path | None = None
    logits: Path | None = None


def find(llama_cpp: str | None) -> LlamaCpp | None:
    """The llama.cpp to use: --llama-cpp DIR, LLAMA_CPP_DIR, PATH, or what `build` made before; else None.

    UserError where a folder that the user named lacks something. A `llama-quantize` alone on PATH is ignored: it needs
    a working converter of the same version.
    """
    for folder, where in ((llama_cpp, "--llama-cpp"), (os.environ.get("LLAMA_CPP_DIR"), "LLAMA_CPP_DIR")):
        if folder:
            return _from_folder(user_path(folder, where).absolute(), where)
    on_path = [shutil.which(name) for name in (CONVERTER, *TARGETS)]
    if all(on_path):
        converter, quantize, server = (Path(str(path)) for path in on_path)
        beside = converter.parent == quantize.parent == server.parent
        if beside and not _converter_fault(converter) and not _start_fault(server):
            imatrix = shutil.which(OURS[0])
            where = f"on PATH, in {quantize.parent}"
            return LlamaCpp(converter, quantize, server, where, _version(server), Path(imatrix) if imatrix else None)
    return own_build()


def _from_folder(folder: Path, where: str) -> LlamaCpp:
    found = _locate([folder, folder / "bin"], [folder / "build" / "bin", folder / "bin", folder])
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"{where} {folder}: {', '.join(missing)} not found there.",
            "Point it at a llama.cpp checkout that is built (cmake -B build && cmake --build build --target "
            "llama-quantize llama-server), or leave it out: Twintune then builds its own.",
        )
    converter, quantize, server = (Path(str(path)) for path in found.values())
    fault = _converter_fault(converter)
    if fault:
        raise UserError(
            f"{where} {folder}: {CONVERTER} does not run:\n{fault}",
            "Use a complete checkout (the converter needs its folders conversion/ and gguf-py/), or leave it out.",
        )
    beside = quantize.with_name(OURS[0] + _EXE)
    imatrix = beside if beside.is_file() else None
    if fault := _start_fault(server):
        raise UserError(
            f"{where} {folder}: {server.name} does not start:\n{fault}",
            "Build it again in that folder, or leave it out: Twintune then builds its own.",
        )
    return LlamaCpp(converter, quantize, server, f"{where} {folder}", _version(server), imatrix)


def _locate(sources: list[Path], bins: list[Path]) -> dict[str, Path | None]:
    """The converter in `sources` and each of TARGETS in `bins`, by name; None for what is in none of the folders."""
    bins = [inner for folder in bins for inner in (folder, folder / "Release")]  # Release/: Visual Studio's generator
    candidates = {CONVERTER: [folder / CONVERTER for folder in sources]}
    candidates |= {name: [folder / (name + _EXE) for folder in bins] for name in TARGETS}
    return {name: next((path for path in paths if path.is_file()), None) for name, paths in candidates.items()}


@cache
def _converter_fault(converter: Path) -> str:
    """Why the converter cannot start, or "". It is tried before training, not after hours of it."""
    code, tail = capture([sys.executable, str(converter), "--help"], 180, env=offline_environment())
    return "" if code == 0 else tail or f"exit status {code}"


def _start_fault(server: Path) -> str:
    """Why the program cannot start on this machine, or ""."""
    code, tail = capture([str(server), "--version"], 60, env=llama_environment())
    return (tail or f"exit status {code}") if not_started(code, tail.splitlines()) else ""


def _version(server: Path) -> str:
    match = re.search(r"version: (.+)", capture([str(server), "--version"], 60, env=llama_environment())[1])
    return match.group(1).strip() if match else "unknown version"


def own_build() -> LlamaCpp | None:
    """The build in the user's cache, where it is complete and of this version."""
    root = cache_root()
    found = list(_locate([root / "source"], [root / "build" / "bin"]).values())
    ours = [root / "build" / "bin" / (name + _EXE) for name in OURS]
    marker = root / "complete"
    if None in found or not all(path.is_file() for path in ours) or not marker.is_file():
        return None
    if marker.read_text(encoding="utf-8") != complete_marker():
        return None
    converter, quantize, server = (Path(str(path)) for path in found)
    where, version = f"built by Twintune, in {_short(root)}", f"llama-cpp-python {VERSION}"
    return LlamaCpp(converter, quantize, server, where, version, *ours)


def complete_marker() -> str:
    """The text that marks a build as complete; it changes with the programs, our tool's source and the flags."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(LOGITS.iterdir()))).hexdigest()
    parts = (f"llama-cpp-python {VERSION}", f"twintune-logits {digest[:12]}", compiler_flags())
    return f"{', '.join((*TARGETS, *OURS))} of {'; '.join(filter(None, parts))}\n"


def compiler_flags() -> str:
    """What leaves out llama.cpp's AMX kernels, on every x86 CPU: compiled by GCC 12 they end by SIGILL.

    Its `_tile_loadconfig` reads 8 of the configuration's 64 bytes, so the compiler drops what is stored in the others.
    Not by what this CPU has: machines that share the cache would build for each other.
    """
    return "-U__AMX_INT8__" if platform.machine().lower() in ("x86_64", "amd64") else ""


def _short(path: Path) -> str:
    return str(Path("~") / path.relative_to(Path.home())) if path.is_relative_to(Path.home()) else str(path)


def cache_root() -> Path:
    """Where our own build lives: source/, build/, build.log and `complete`, which is written last."""
    return cache_folder() / f"llama.cpp-{VERSION}"


def clean() -> list[tuple[Path, int]]:
    """Remove our own builds of all versions; the removed folders and their sizes in bytes.

    Raises UserError where another process is building one: what comes after it stays.
    """
    removed = []
    for folder in sorted(cache_root().parent.glob("llama.cpp-*")):

        def refuse(text: str, folder: Path = folder) -> None:
            raise UserError(f"{folder} is being built by another process.", "Wait for it, or stop it first.")

        with artifact_lock(folder, refuse):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
            shutil.rmtree(folder)
        removed.append((folder, size))
    return removed


def llama_environment() -> dict[str, str]:
    """The environment of llama.cpp's programs: no hub token, nor LLAMA_ARG_* and LLAMA_API_*, which override flags."""
    env = offline_environment()
    return {name: value for name, value in env.items() if not name.startswith(("LLAMA_ARG_", "LLAMA_API_"))}


def which(name: str) -> str | None:
    """The program's path: on PATH, else beside the running Python, where pip puts its own `cmake` and `ninja`."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))

"""Build llama.cpp from its pinned source, with two programs to measure by.

The source is in the source distribution of llama-cpp-python. pip fetches it with the user's own settings (mirror,
proxy, certificate) and checks it against a hash, so neither git nor a second download route is needed.
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

from common.backend import Progress
from common.errors import UserError
from common.files import atomic_folder, atomic_write, scratch_folder
from common.llama_cpp.install import (
    LOGITS,
    OURS,
    TARGETS,
    VERSION,
    LlamaCpp,
    cache_root,
    compiler_flags,
    complete_marker,
    find,
    own_build,
    which,
)
from common.system.cache import artifact_lock, pip_remedy
from common.system.disk import require_disk
from common.system.hardware import cores
from common.system.process import capture, fraction, run_logged

SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

_OFF = (
    *("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP"),
    *("LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI"),  # the prebuilt web page would be downloaded during the build
)

# pip asks a source distribution's build backend for name and version before it keeps the file. This stub answers in its
# place, so that pip need not download the real backend and what that depends on.
_STUB_BACKEND = f"""import os
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "llama_cpp_python-{VERSION}.dist-info"
    os.mkdir(os.path.join(metadata_directory, name))
    with open(os.path.join(metadata_directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {VERSION}\\n")
    return name
"""


def ensure(llama_cpp: str | None, progress: Progress) -> LlamaCpp:
    """`find`, else `build`. Raises what those raise."""
    return find(llama_cpp) or build(progress)


def own(progress: Progress) -> LlamaCpp:
    """Our own build, whichever llama.cpp is used otherwise: only it has `twintune-logits`. Raises as `build` does."""
    return own_build() or build(progress)


def build_bytes(needed: bool, llama_cpp: str | None) -> int:
    """What a build will write to the cache, where llama.cpp is `needed` and there is none; measured without CUDA."""
    if not needed or find(llama_cpp) is not None:
        return 0
    return _build_bytes()


def _build_bytes() -> int:
    return 3_000_000_000 if _has_cuda() else 400_000_000


def build(progress: Progress) -> LlamaCpp:
    """Download the pinned source, compile it in the user's cache folder, and return the result.

    A build that was killed continues; a second process waits for the first. Raises UserError where tools are missing,
    the download fails, or the compiler does (with the log's path and its last lines).
    """
    missing = missing_build_tools()
    if missing:
        raise UserError(
            "llama.cpp has to be built once, and this is missing: " + "; ".join(missing) + ".",
            "Install it, or name a folder that holds a built llama.cpp with --llama-cpp DIR.",
        )
    root = cache_root()
    require_disk(
        [(root, "building llama.cpp", _build_bytes())], "Free some space, or name a built one: --llama-cpp DIR."
    )
    root.mkdir(parents=True, exist_ok=True)
    # handed on to what is started: a killed build's last compiler ends before another process begins
    with artifact_lock(root, lambda text: progress(0.0, text), every=1) as lock:
        ready = own_build()
        if ready is None:
            (root / "build.log").unlink(missing_ok=True)  # of a build that failed
            if not (root / "source").is_dir():
                _fetch(root, lock, progress)
            _compile(root, lock, progress)
            with atomic_write(root / "complete") as temporary:
                temporary.write_text(complete_marker(), encoding="utf-8")
            ready = own_build()
    if ready is None:
        raise UserError(f"The build in {root} produced no binaries.", "Delete that folder and try again.")
    return ready


def add_tool(built: LlamaCpp, name: str, progress: Progress) -> Path:
    """The path of one more of llama.cpp's programs, compiled in our own build where it is not there yet.

    Most users need none of these. Raises UserError as `build` does.
    """
    root, tool = cache_root(), built.quantize.with_name(name + built.quantize.suffix)
    with artifact_lock(root, lambda text: progress(0.0, text), every=1) as lock:
        if tool.is_file():
            return tool
        progress(0.0, f"compiling {name}")
        command = [which("cmake") or "cmake", "--build", str(root / "build"), "--config", "Release"]
        log = root / f"{name}.log"
        log.unlink(missing_ok=True)
        code, tail = run_logged([*command, "--target", name], log, lambda line: None, keep=(lock,))
        if code != 0 or not tool.is_file():
            raise UserError(f"{name} could not be built. Its log, {log}, ends with:\n{tail}", "Fix what it names.")
        log.unlink()
        return tool


def _fetch(root: Path, lock: int, progress: Progress) -> None:
    progress(0.0, "downloading llama.cpp's source (77 MB)")
    with scratch_folder(root) as work:
        (work / "scikit_build_core").mkdir()
        (work / "scikit_build_core" / "__init__.py").touch()
        (work / "scikit_build_core" / "build.py").write_text(_STUB_BACKEND)
        (work / "requirements.txt").write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-build-isolation"]
        command += ["--require-hashes", "--no-binary", "llama-cpp-python"]
        command += ["-d", str(work), "-r", str(work / "requirements.txt")]
        search = os.pathsep.join(filter(None, (str(work), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "PYTHONPATH": search}
        code, tail = run_logged(command, root / "build.log", lambda line: None, env, keep=(lock,))
        archive = next(work.glob("llama_cpp_python-*.tar.gz"), None)
        if code != 0 or archive is None:
            raise UserError(
                f"pip could not download llama-cpp-python {VERSION}, which holds llama.cpp's source:\n{tail}",
                "Check the network and pip's settings (pip config list), or name a folder that holds a built llama.cpp "
                "with --llama-cpp DIR.",
            )
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise UserError(f"{archive.name} is not the pinned file.", "Check which package index pip uses.")
        progress(0.02, "unpacking llama.cpp's source")
        with atomic_folder(root / "source") as source:
            extract(archive, f"llama_cpp_python-{VERSION}/vendor/llama.cpp", source)


def extract(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the plain files under `prefix` of a tar.gz into `target`; UserError on a link or a path that leads out.

    The `.git` file is left out: it names a repository that is not there, about which CMake would complain.
    """

    def inner(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        name = member.name.removeprefix(f"{prefix}/")
        if name in (member.name, ".git", ""):
            return None
        if not (member.isreg() or member.isdir()):
            raise UserError(f"{archive.name}: {member.name} is a link.", remedy)
        return tarfile.data_filter(member.replace(name=name, deep=False), path)

    remedy = "Check which package index pip uses."
    with tarfile.open(archive, "r:gz") as tar:
        try:
            tar.extractall(target, filter=inner)  # noqa: S202  # the filter refuses what leads out
        except tarfile.FilterError as error:
            raise UserError(f"{archive.name}: unsafe path: {error}", remedy) from error


def _compile(root: Path, lock: int, progress: Progress) -> None:
    log, folder = root / "build.log", root / "build"
    tool = root / "logits"  # a copy, so that the build works when this checkout moves
    shutil.copytree(LOGITS, tool, dirs_exist_ok=True)
    cmake = which("cmake") or "cmake"
    last = (0, "")
    # CUDA's compiler refuses many host compilers. A CPU build does the same work more slowly, and is better than no
    # GGUF at the end of training.
    for cuda in (True, False) if _has_cuda() else (False,):
        configure = [cmake, "-S", str(root / "source"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{name}=OFF" for name in _OFF] + [f"-DGGML_CUDA={'ON' if cuda else 'OFF'}"]
        if flags := compiler_flags():  # before the user's own, which CMake would not read beside these
            own = {language: os.environ.get(f"{language}FLAGS", "") for language in ("C", "CXX")}
            configure += [f"-DCMAKE_{language}_FLAGS={flags} {more}" for language, more in own.items()]
        configure.append(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={tool / 'logits.cmake'}")
        if cuda:
            configure.append("-DCMAKE_CUDA_ARCHITECTURES=native")
        if not (folder / "CMakeCache.txt").is_file() and (ninja := which("ninja")):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        name = f"compiling llama.cpp ({'CUDA' if cuda else 'Metal' if sys.platform == 'darwin' else 'CPU'})"
        progress(0.03, name)

        def advance(line: str, name: str = name) -> None:
            done = fraction(line)
            if done is not None:
                progress(0.03 + 0.97 * done, name)

        make = [
            cmake,
            "--build",
            str(folder),
            "--config",
            "Release",
            "--parallel",
            str(cores()),
            "--target",
            *TARGETS,
            *OURS,
        ]
        last = run_logged(configure, log, lambda line: None, keep=(lock,))
        if last[0] == 0:
            last = run_logged(make, log, advance, keep=(lock,))
        if last[0] == 0:
            return
        if cuda:
            shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        f"llama.cpp could not be built. Its log, {log}, ends with:\n{last[1]}",
        f"Fix what it names, delete {folder} and try again; or name a built llama.cpp with --llama-cpp DIR.",
    )


def missing_build_tools() -> list[str]:
    """What `build` needs and this machine lacks, each with how to install it."""
    mac = sys.platform == "darwin"
    missing = []
    python = shlex.quote(sys.executable)
    how = f"{'brew' if mac else 'apt'} install cmake, or: {python} -m pip install cmake"
    cmake = which("cmake")
    version = re.search(r"version (\d+)\.(\d+)", capture([cmake, "--version"], 60)[1]) if cmake else None
    if version is None:
        missing.append(f"CMake 3.14 or newer ({how})")
    elif (int(version[1]), int(version[2])) < (3, 14):
        missing.append(f"CMake 3.14 or newer, this one is {version[1]}.{version[2]} ({how})")
    if mac:  # every Mac has /usr/bin/c++ and make; without the command line tools they only open a dialog
        if capture(["xcode-select", "-p"], 60)[0] != 0:
            missing.append("a C++ compiler (xcode-select --install)")
    elif os.name != "nt":  # on Windows CMake itself looks for Visual Studio
        if not (os.environ.get("CXX") or any(map(which, ("c++", "g++", "clang++")))):
            missing.append("a C++ compiler (apt install g++)")
        if not (which("ninja") or which("make")):
            missing.append("make or ninja (apt install make)")
    if capture([sys.executable, "-P", "-m", "pip", "--version"], 60)[0] != 0:
        missing.append(f"pip in this environment ({pip_remedy()})")
    return missing


def _has_cuda() -> bool:
    return which("nvcc") is not None and "GPU 0" in capture(["nvidia-smi", "-L"], 60)[1]

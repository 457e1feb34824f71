"""Find llama.cpp or build it: its converter, `llama-quantize` and `llama-server`; with ours, two tools to measure by.

The source is pinned. It lies, whole, in the source distribution of llama-cpp-python, which pip fetches with the user's
own settings (mirror, proxy, certificate) and checks against a hash: no git and no second download route are needed.
"""

import hashlib
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.backend import Progress
from common.errors import UserError
from common.system.cache import artifact_lock, cache_folder
from common.system.process import capture, fraction, run_logged

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TARGETS = ("llama-quantize", "llama-server")
OURS = ("llama-imatrix", "twintune-logits")  # built beside; the second is our own, from common/llama_cpp/logits_tool
LOGITS = Path(__file__).with_name("logits_tool")
CONVERTER = "convert_hf_to_gguf.py"

_EXE = ".exe" if os.name == "nt" else ""
_OFF: tuple[str, ...] = (
    "BUILD_SHARED_LIBS",
    "LLAMA_OPENSSL",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_APP",
)
_OFF += ("LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI")  # the prebuilt web page would be downloaded during the build

# pip will not hand over a source distribution before its build backend has stated its name and version. This stands in
# for that backend, so that pip need not fetch the real one (and its own needs) for two lines of metadata.
_STUB_BACKEND = f"""import os
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "llama_cpp_python-{VERSION}.dist-info"
    os.mkdir(os.path.join(metadata_directory, name))
    with open(os.path.join(metadata_directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {VERSION}\\n")
    return name
"""


@dataclass(frozen=True)
class LlamaCpp:
    """A usable llama.cpp. `where` says how it was found, `version` what it calls itself.

    imatrix: `llama-imatrix`, where there is one. logits: our own tool, in our own build alone.
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

    A folder the user named must be whole (UserError); a lone `llama-quantize` on PATH is passed over, because binaries
    without a working converter of the same age are no help.
    """
    for folder, where in ((llama_cpp, "--llama-cpp"), (os.environ.get("LLAMA_CPP_DIR"), "LLAMA_CPP_DIR")):
        if folder:
            return _from_folder(Path(folder).expanduser().absolute(), where)
    on_path = [shutil.which(name) for name in (CONVERTER, *TARGETS)]
    if all(on_path):
        converter, quantize, server = (Path(str(path)) for path in on_path)
        if converter.parent == quantize.parent == server.parent and not _converter_fault(converter):
            imatrix = shutil.which(OURS[0])
            where = f"on PATH, in {quantize.parent}"
            return LlamaCpp(converter, quantize, server, where, _version(server), Path(imatrix) if imatrix else None)
    return _our_build()


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
            "Use a whole checkout (the converter needs its folders conversion/ and gguf-py/), or leave it out.",
        )
    beside = quantize.with_name(OURS[0] + _EXE)
    imatrix = beside if beside.is_file() else None
    return LlamaCpp(converter, quantize, server, f"{where} {folder}", _version(server), imatrix)


def _locate(sources: list[Path], bins: list[Path]) -> dict[str, Path | None]:
    bins = [place for folder in bins for place in (folder, folder / "Release")]  # Release/: Visual Studio's generator
    candidates = {CONVERTER: [place / CONVERTER for place in sources]}
    candidates |= {name: [place / (name + _EXE) for place in bins] for name in TARGETS}
    return {name: next((path for path in paths if path.is_file()), None) for name, paths in candidates.items()}


@cache
def _converter_fault(converter: Path) -> str:
    """Why the converter cannot start, or "". Asked at once, because after hours of training it would come too late."""
    code, tail = capture([sys.executable, str(converter), "--help"], 180)
    return "" if code == 0 else tail or f"exit status {code}"


def _version(server: Path) -> str:
    match = re.search(r"version: (.+)", capture([str(server), "--version"], 60)[1])
    return match.group(1).strip() if match else "unknown version"


def _our_build() -> LlamaCpp | None:
    root = cache_root()
    found = list(_locate([root / "source"], [root / "build" / "bin"]).values())
    ours = [root / "build" / "bin" / (name + _EXE) for name in OURS]
    marker = root / "complete"
    if None in found or not all(path.is_file() for path in ours) or not marker.is_file():
        return None
    if marker.read_text(encoding="utf-8") != _complete():
        return None
    converter, quantize, server = (Path(str(path)) for path in found)
    where, version = f"built by Twintune, in {_short(root)}", f"llama-cpp-python {VERSION}"
    return LlamaCpp(converter, quantize, server, where, version, *ours)


def _complete() -> str:
    """What a whole build's marker holds: an older Twintune's lacks tools, or has another `twintune-logits`."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(LOGITS.iterdir()))).hexdigest()
    return f"{', '.join((*TARGETS, *OURS))} of llama-cpp-python {VERSION}; twintune-logits {digest[:12]}\n"


def _short(path: Path) -> str:
    return str(Path("~") / path.relative_to(Path.home())) if path.is_relative_to(Path.home()) else str(path)


def cache_root() -> Path:
    """Where our own build lives: source/, build/, build.log and `complete`, which is written last."""
    return cache_folder() / f"llama.cpp-{VERSION}"


def missing_build_tools() -> list[str]:
    """What `build` needs and this machine lacks, each with the way to get it; empty where all is there."""
    mac = sys.platform == "darwin"
    missing = []
    how = ("brew install cmake" if mac else "apt install cmake") + ", or: python -m pip install cmake"
    cmake = which("cmake")
    version = re.search(r"version (\d+)\.(\d+)", capture([cmake, "--version"], 60)[1]) if cmake else None
    if version is None:
        missing.append(f"CMake 3.14 or newer ({how})")
    elif (int(version[1]), int(version[2])) < (3, 14):
        missing.append(f"CMake 3.14 or newer, this one is {version[1]}.{version[2]} ({how})")
    if mac:  # /usr/bin/c++ and make exist on every Mac; without the command line tools they only open a dialogue
        if capture(["xcode-select", "-p"], 60)[0] != 0:
            missing.append("a C++ compiler (xcode-select --install)")
    elif os.name != "nt":  # on Windows CMake itself looks for Visual Studio
        if not (os.environ.get("CXX") or any(map(which, ("c++", "g++", "clang++")))):
            missing.append("a C++ compiler (apt install g++)")
        if not (which("ninja") or which("make")):
            missing.append("make or ninja (apt install make)")
    if capture([sys.executable, "-P", "-m", "pip", "--version"], 60)[0] != 0:
        missing.append(f"pip in this environment ({_PIP_REMEDY})")
    return missing


_PIP_REMEDY = "python -m ensurepip, or in an environment made by uv: uv pip install pip"


def ensure(llama_cpp: str | None, progress: Progress) -> LlamaCpp:
    """`find`, else `build`. Raises what those raise."""
    return find(llama_cpp) or build(progress)


def own(progress: Progress) -> LlamaCpp:
    """Our own build, whichever llama.cpp is used else: only it has the tool that gives logits. Raises as `build`."""
    return _our_build() or build(progress)


def clean() -> list[tuple[Path, int]]:
    """Remove every build of ours, of this version and others; the folders and their sizes in bytes."""
    removed = []
    for folder in sorted(cache_root().parent.glob("llama.cpp-*")):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        shutil.rmtree(folder)
        removed.append((folder, size))
    return removed


def build(progress: Progress) -> LlamaCpp:
    """Download the pinned source, compile it in the user's cache folder, and return the result.

    A killed build goes on where it stopped; a second process waits for the first one's. Raises UserError where tools
    are missing, the download fails or the compiler does (naming the log, with its last lines).
    """
    missing = missing_build_tools()
    if missing:
        raise UserError(
            "llama.cpp has to be built once, and this is missing: " + "; ".join(missing) + ".",
            "Install it, or name a folder that holds a built llama.cpp with --llama-cpp DIR.",
        )
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with artifact_lock(root, lambda text: progress(0.0, text)):
        ready = _our_build()
        if ready is None:
            if not (root / "source").is_dir():
                _fetch(root, progress)
            _compile(root, progress)
            (root / "complete").write_text(_complete(), encoding="utf-8")
            ready = _our_build()
    if ready is None:
        raise UserError(f"The build in {root} left no binaries.", "Delete that folder and try again.")
    return ready


def _fetch(root: Path, progress: Progress) -> None:
    progress(0.0, "downloading llama.cpp's source (77 MB)")
    for left in root.glob("download-*"):  # by a process that was killed; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as name:
        work = Path(name)
        (work / "scikit_build_core").mkdir()
        (work / "scikit_build_core" / "__init__.py").touch()
        (work / "scikit_build_core" / "build.py").write_text(_STUB_BACKEND)
        (work / "requirements.txt").write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        command = [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--require-hashes",
        ]
        command += ["--no-binary", "llama-cpp-python", "-d", name, "-r", str(work / "requirements.txt")]
        search = os.pathsep.join(filter(None, (name, os.environ.get("PYTHONPATH"))))
        code, tail = run_logged(command, root / "build.log", lambda line: None, {**os.environ, "PYTHONPATH": search})
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
        extract(archive, f"llama_cpp_python-{VERSION}/vendor/llama.cpp", work / "source")
        (work / "source").rename(root / "source")  # so that source/ is whole wherever it exists


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


def _compile(root: Path, progress: Progress) -> None:
    log, folder = root / "build.log", root / "build"
    tool = root / "logits"  # a copy, so that the build does not lean on where this checkout lies
    shutil.copytree(LOGITS, tool, dirs_exist_ok=True)
    cmake = which("cmake") or "cmake"
    last = (0, "")
    # CUDA's compiler is particular about its host compiler. A CPU build does the same work here, more slowly: rather
    # that than no GGUF at the end of a training.
    for cuda in (True, False) if _has_cuda() else (False,):
        configure = [cmake, "-S", str(root / "source"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-D{name}=OFF" for name in _OFF] + [f"-DGGML_CUDA={'ON' if cuda else 'OFF'}"]
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

        jobs = str(os.cpu_count() or 1)
        make = [cmake, "--build", str(folder), "--config", "Release", "--parallel", jobs, "--target", *TARGETS, *OURS]
        last = run_logged(configure, log, lambda line: None)
        if last[0] == 0:
            last = run_logged(make, log, advance)
        if last[0] == 0:
            return
        if cuda:
            shutil.rmtree(folder, ignore_errors=True)
    raise UserError(
        f"llama.cpp could not be built. Its log, {log}, ends with:\n{last[1]}",
        f"Fix what it names, delete {folder} and try again; or name a built llama.cpp with --llama-cpp DIR.",
    )


def llama_environment() -> dict[str, str]:
    """The environment without LLAMA_ARG_* and LLAMA_API_*: llama.cpp's programs read them in place of our flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_ARG_", "LLAMA_API_"))}


def _has_cuda() -> bool:
    return which("nvcc") is not None and "GPU 0" in capture(["nvidia-smi", "-L"], 60)[1]


def which(name: str) -> str | None:
    """PATH, then beside the running Python: pip's own `cmake` and `ninja` lie there, on PATH or not."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))

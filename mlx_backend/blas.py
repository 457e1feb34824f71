"""OpenBLAS for MLX's products on a Linux CPU. Imports no MLX: it must be loaded first."""

import _ctypes
import ctypes
import ctypes.util
import os
import sys
from contextlib import suppress

from common.system.cgroup import core_limit
from common.system.hardware import cores, cpu_flags

_CORE = "OPENBLAS_CORETYPE"  # read once, while the library is loaded
_FALLBACK = b"Prescott"  # the kernels for a CPU that this OpenBLAS does not know: SSE3


def preload() -> str | None:
    """The name of the BLAS that MLX's products use on a CPU, loaded; None where only the slow reference BLAS is here.

    Must run before mlx is imported. A library loaded globally comes before those that mlx brings along, so its
    `cblas_sgemm` is the one called: about 15 times faster than the reference BLAS on two cores. Only Linux needs it.
    """
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    if loaded := _loaded():
        return os.path.basename(loaded)
    name = ctypes.util.find_library("openblas")
    if name is None or "mlx.core" in sys.modules:
        return None
    if core_limit() is not None:  # OpenBLAS starts a thread for every core of the machine
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(cores()))
    try:
        _load(name)
    except OSError:
        return None
    return name


def better_core(library: ctypes.CDLL) -> str | None:
    """The kernels to ask for where this OpenBLAS does not know the CPU, and took its slowest.

    None where it knows it, where the CPU has no AVX2, and where the user has chosen.
    """
    return None if _CORE in os.environ or _chosen(library) != _FALLBACK else _known_core()


def slow_core() -> str | None:
    """`better_core` of the OpenBLAS that is loaded: by someone else, or it would have been loaded again."""
    path = _loaded() if sys.platform.startswith("linux") else None
    return better_core(ctypes.CDLL(path)) if path and os.path.basename(path).startswith("libopenblas") else None


def _known_core() -> str | None:
    """The newest kernels that every version of OpenBLAS has for this CPU; None for a CPU without AVX2."""
    flags = cpu_flags()
    if {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None


def _load(name: str) -> None:
    """Load it; one that is older than the CPU again, for other kernels than its slowest."""
    library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    if (core := better_core(library)) is None:
        return
    _ctypes.dlclose(library._handle)
    os.environ[_CORE] = core
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    finally:
        del os.environ[_CORE]  # numpy's own copy knows more CPUs


def _chosen(library: ctypes.CDLL) -> bytes:
    name = getattr(library, "openblas_get_corename", None)  # none in a build with a suffix
    if name is None:
        return b""
    name.restype = ctypes.c_char_p
    return bytes(name() or b"")


def _loaded() -> str | None:
    """The path of a BLAS whose functions MLX would call."""
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            # numpy's and scipy's own copies carry prefixed names that nobody else can call
            if os.path.basename(path).startswith(("libopenblas", "libmkl_rt", "libblis")):
                return path
    return None

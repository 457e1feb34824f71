"""OpenBLAS for MLX on a Linux CPU: an OpenBLAS that does not know the CPU still gets the kernels that it could run."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_backend import blas, devices

AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


class Library:
    """OpenBLAS in ctypes' place: `knows` the CPU, or falls back; it reads its variable while it is loaded."""

    def __init__(self, knows: bytes) -> None:
        self.knows, self.closed = knows, 0
        self.loads: list[str] = []

    def load(self, name: str, mode: int) -> Any:
        wanted = os.environ.get("OPENBLAS_CORETYPE", "")
        self.loads.append(wanted)
        core = wanted.encode() or self.knows
        return SimpleNamespace(_handle=1, openblas_get_corename=Named(core))

    def close(self, handle: int) -> None:
        self.closed += 1


class Named:
    """A function of a library whose type of result can be set."""

    restype: Any = None

    def __init__(self, core: bytes) -> None:
        self.core = core

    def __call__(self) -> bytes:
        return self.core


@pytest.mark.parametrize(
    ("flags", "knows", "loads"),
    [
        (AVX512, b"Prescott", ["", "SkylakeX"]),
        (AVX2, b"Prescott", ["", "Haswell"]),
        (AVX512, b"Cooperlake", [""]),
        (set(), b"Prescott", [""]),  # a CPU that has no more
    ],
)
def test_kernels_for_a_cpu_that_openblas_does_not_know(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], knows: bytes, loads: list[str]
) -> None:
    library = Library(knows)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(blas, "cpu_flags", lambda: flags)
    monkeypatch.setattr(blas.ctypes, "CDLL", library.load)
    monkeypatch.setattr(blas._ctypes, "dlclose", library.close)
    blas._load("libopenblas.so.0")
    assert library.loads == loads
    assert library.closed == len(loads) - 1
    assert "OPENBLAS_CORETYPE" not in os.environ


def test_kernels_that_the_user_chose_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(b"Prescott")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setattr(blas, "cpu_flags", lambda: AVX512)
    monkeypatch.setattr(blas.ctypes, "CDLL", library.load)
    blas._load("libopenblas.so.0")
    assert library.loads == ["Prescott"]
    assert os.environ["OPENBLAS_CORETYPE"] == "Prescott"


def test_a_build_that_does_not_name_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(blas, "cpu_flags", lambda: AVX512)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda name, mode: SimpleNamespace(_handle=1))
    blas._load("libopenblas64.so.0")


@pytest.mark.parametrize("chosen", ["", "Haswell"])
def test_one_that_was_loaded_by_someone_else_comes_with_a_warning(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if chosen:
        monkeypatch.setenv("OPENBLAS_CORETYPE", chosen)
    monkeypatch.setattr(blas, "cpu_flags", lambda: AVX512)
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.setattr(blas, "_loaded", lambda: "/somewhere/libopenblas.so.0")
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: SimpleNamespace(openblas_get_corename=Named(b"Prescott")))
    monkeypatch.setattr(devices, "import_mlx", lambda: SimpleNamespace(gpu=None, is_available=lambda gpu: False))
    warned = "libopenblas.so.0 does not know this CPU, and was loaded with its slowest kernels: set "
    assert devices.choose_device("cpu").warning == ("" if chosen else f"{warned}OPENBLAS_CORETYPE=SkylakeX")


REAL = """
import ctypes, os
from mlx_backend.blas import _known_core, preload
name = preload()
import mlx.core as mx
mx.set_default_device(mx.cpu)
assert mx.allclose(mx.ones((64, 64)) @ mx.ones((64, 64)), mx.full((64, 64), 64.0))
child = os.fork()
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
library = ctypes.CDLL(name)
library.openblas_get_corename.restype = ctypes.c_char_p
print(_known_core(), library.openblas_get_corename().decode())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux needs OpenBLAS")
@pytest.mark.skipif(blas.ctypes.util.find_library("openblas") is None, reason="no OpenBLAS here")
def test_the_real_one_computes_with_no_fallback_and_forks() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    done = subprocess.run([sys.executable, "-c", REAL], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    known, chosen = done.stdout.split()
    assert known == "None" or chosen != "Prescott"

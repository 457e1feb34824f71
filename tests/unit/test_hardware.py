"""Backend, device and precision on machines of every kind, each with its reason."""

import inspect
import re
import sys
import types
from pathlib import Path

import pytest

import mlx_backend
import torch_backend
from common.backend import BackendPackage, Choice
from common.commands.doctor import doctor
from common.commands.prepare import choose_hardware
from common.errors import UserError
from common.memory_terms import MemoryTerms
from common.options import Options
from common.system import hardware
from common.system.hardware import Gpu, choose_backend
from tests.contexts import context

NO_GPU = "no Apple silicon and no NVIDIA GPU that torch can use: the CPU"
AMPERE = Gpu("NVIDIA A100", (8, 0), 1 << 36)
TURING = Gpu("Tesla T4", (7, 5), 1 << 34)


class Machine:
    """The facts that the choice looks at, set one by one. At first: Linux, no GPU, torch and MLX installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._patch.setattr(hardware, "_has_mlx_library", lambda: True)
        self.apple(False).gpu(None).have("torch", "mlx", "mlx_lm").cpu("")

    def _set(self, name: str, value: object) -> "Machine":
        """In every module that has taken the function over."""
        for module in (hardware, torch_backend.devices, mlx_backend.devices):
            if hasattr(module, name):
                self._patch.setattr(module, name, value)
        return self

    def apple(self, yes: bool = True) -> "Machine":
        return self._set("apple_silicon", lambda: yes)

    def gpu(self, gpu: Gpu | None, torch_sees_it: bool = True) -> "Machine":
        return self._set("nvidia_gpu", lambda: gpu)._set("sees_cuda", lambda: gpu is not None and torch_sees_it)

    def have(self, *modules: str) -> "Machine":
        return self._set("installed", lambda module: module in modules)

    def cpu(self, flag: str) -> "Machine":
        return self._set("cpu_bf16", lambda: flag)

    def mlx_gpu(self, yes: bool, blas: str | None = "libopenblas.so.0") -> "Machine":
        core = types.SimpleNamespace(gpu="gpu", is_available=lambda device: yes)
        return self._set("import_mlx", lambda: core)._set("preload", lambda: blas)

    def mps(self, yes: bool) -> "Machine":
        torch = types.ModuleType("torch")
        mps = types.SimpleNamespace(is_available=lambda: yes)
        torch.backends = types.SimpleNamespace(mps=mps)  # type: ignore[attr-defined]
        self._patch.setitem(sys.modules, "torch", torch)
        return self


def packages(name: str) -> BackendPackage:
    return {"torch": torch_backend, "mlx": mlx_backend}[name]  # type: ignore[return-value]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# --- backend


def test_apple_silicon_gets_mlx(machine: Machine) -> None:
    machine.apple().mlx_gpu(True)
    assert choose_backend("auto", packages) == Choice("mlx", "this is Apple silicon")


@pytest.mark.parametrize("modules", [("torch",), ("torch", "mlx")])
def test_apple_silicon_without_all_of_mlx_gets_torch_and_is_told(machine: Machine, modules: tuple[str, ...]) -> None:
    machine.apple().have(*modules)
    choice = choose_backend("auto", packages)
    assert choice.value == "torch"
    assert re.fullmatch("this is Apple silicon, but mlx(-lm)? is not installed", choice.why)
    assert choice.warning == ""


def test_an_nvidia_gpu_gets_torch(machine: Machine) -> None:
    machine.gpu(AMPERE)
    assert choose_backend("auto", packages) == Choice("torch", "an NVIDIA GPU is here")


def test_a_gpu_that_torch_cannot_use_is_none(machine: Machine) -> None:
    machine.gpu(AMPERE, torch_sees_it=False)
    assert choose_backend("auto", packages) == Choice("torch", NO_GPU)


def test_a_plain_machine_gets_torch_though_mlx_is_there(machine: Machine) -> None:
    assert choose_backend("auto", packages).value == "torch"


@pytest.mark.parametrize("wanted", ["mlx", "torch"])
def test_a_backend_that_is_asked_for(machine: Machine, wanted: str) -> None:
    assert choose_backend(wanted, packages) == Choice(wanted, "asked for")


@pytest.mark.parametrize(
    ("system", "missing", "fix"),
    [
        ("linux", "mlx", 'pip install -e ".[mlx-cpu]" (or mlx-cuda12, mlx-cuda13 with an NVIDIA GPU)'),
        ("linux", "mlx_lm", 'pip install -e ".[mlx-cpu]" (or mlx-cuda12, mlx-cuda13 with an NVIDIA GPU)'),
        ("darwin", "mlx", "pip install mlx mlx-lm"),
        ("win32", "mlx", "use --backend torch: MLX has no build for this system"),
    ],
)
def test_mlx_that_is_missing_says_what_to_install(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, system: str, missing: str, fix: str
) -> None:
    machine.have(*({"mlx", "mlx_lm", "torch"} - {missing}))
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(UserError) as caught:
        choose_backend("mlx", packages)
    assert caught.value.what == f"--backend mlx: {missing.replace('_', '-')} is not installed."
    assert caught.value.fix == fix


def test_torch_that_is_missing_says_what_to_install(machine: Machine) -> None:
    machine.have("mlx", "mlx_lm")
    with pytest.raises(UserError, match="torch is not installed") as caught:
        choose_backend("torch", packages)
    assert caught.value.fix == "pip install torch"


PART = 'pip install -e ".[mlx-cpu]" (or mlx-cuda12, mlx-cuda13 with an NVIDIA GPU)'


@pytest.fixture
def broken_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MLX as on Linux without its CPU or CUDA part: importing mlx.core fails. Returns its folder."""
    (tmp_path / "mlx").mkdir()
    reason = "libmlx.so: cannot open shared object file: No such file or directory"
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({reason!r})\n")
    (tmp_path / "mlx_lm.py").write_text("")
    (tmp_path / "mlx" / "__init__.py").write_text("")  # or the real one would be a part of the same namespace
    for name in {"mlx", "mlx.core", "mlx_lm"} | {name for name in sys.modules if name.startswith(("mlx.", "mlx_lm."))}:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hardware, "apple_silicon", lambda: False)
    for module in (hardware, torch_backend.devices):
        monkeypatch.setattr(module, "nvidia_gpu", lambda: None)
    return tmp_path / "mlx"


def test_mlx_without_its_library_is_a_fault_with_its_remedy(broken_mlx: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose_backend("mlx", packages)
    assert caught.value.what == "--backend mlx: mlx is installed without its CPU or CUDA part (libmlx.so)."
    assert caught.value.fix == PART


def test_mlx_whose_library_cannot_be_loaded_is_a_fault_with_its_remedy(broken_mlx: Path) -> None:
    (broken_mlx / "lib").mkdir()
    (broken_mlx / "lib" / "libmlx.so").touch()
    assert choose_backend("mlx", packages).value == "mlx"
    with pytest.raises(UserError, match=r"MLX is installed but cannot be loaded: libmlx\.so: cannot open") as caught:
        mlx_backend.choose_device("auto")
    assert caught.value.fix == PART


def test_auto_falls_back_to_torch_from_a_broken_mlx_with_a_warning(broken_mlx: Path) -> None:
    choice = choose_backend("auto", packages)
    assert (choice.value, choice.why) == ("torch", NO_GPU)
    assert choice.warning == f"mlx is installed without its CPU or CUDA part (libmlx.so). {PART}"


def test_on_apple_silicon_a_broken_mlx_is_left_for_torch_too(broken_mlx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "apple_silicon", lambda: True)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mlx_backend.devices, "preload", lambda: None)
    choice = choose_backend("auto", packages)
    assert choice.value == "torch"
    assert choice.why.startswith("this is Apple silicon, but MLX is installed but cannot be loaded: libmlx.so")
    assert choice.warning.endswith("pip install mlx mlx-lm")


def test_train_warns_of_it(broken_mlx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardware_of = choose_hardware(Options(), context("json"))
    assert hardware_of.backend.value == "torch"
    assert "mlx is installed without its CPU or CUDA part" in capsys.readouterr().out


def test_doctor_shows_it_in_its_table(broken_mlx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor(context("plain"))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "train on mlx" in shown
    assert "missing: --backend mlx: mlx is installed without its CPU or CUDA part" in shown
    assert "Traceback" not in shown


def test_both_packages_answer_what_the_contract_asks() -> None:
    for protocol, modules in (
        (BackendPackage, (torch_backend, mlx_backend)),
        (MemoryTerms, (torch_backend.memory_terms, mlx_backend.memory_terms)),
    ):
        for name, asked in vars(protocol).items():
            if inspect.isfunction(asked) and not name.startswith("_"):
                expected = [parameter for parameter in inspect.signature(asked).parameters if parameter != "self"]
                for module in modules:
                    assert list(inspect.signature(getattr(module, name)).parameters) == expected, (module, name)


# --- device


@pytest.mark.parametrize(
    ("gpu", "wanted", "choice"),
    [
        (True, "auto", Choice("gpu", "MLX has a GPU here")),
        (False, "auto", Choice("cpu", "MLX has no GPU here; libopenblas.so.0 computes its products")),
        (True, "gpu", Choice("gpu", "asked for")),
        (True, "cpu", Choice("cpu", "asked for; libopenblas.so.0 computes its products")),
    ],
)
def test_mlxs_device(machine: Machine, gpu: bool, wanted: str, choice: Choice) -> None:
    machine.mlx_gpu(gpu)
    assert mlx_backend.choose_device(wanted) == choice


@pytest.mark.parametrize(
    ("gpu", "wanted", "said"),
    [
        (False, "gpu", "--device gpu: this MLX sees no GPU."),
        (True, "cuda", "--device cuda is torch's; MLX has cpu and gpu."),
        (True, "mps", "--device mps is torch's; MLX has cpu and gpu."),
    ],
)
def test_a_device_that_mlx_lacks(machine: Machine, gpu: bool, wanted: str, said: str) -> None:
    machine.mlx_gpu(gpu)
    with pytest.raises(UserError) as caught:
        mlx_backend.choose_device(wanted)
    assert caught.value.what == said


@pytest.mark.parametrize(
    ("gpu", "wanted", "choice"),
    [
        (AMPERE, "auto", Choice("cuda", "an NVIDIA GPU is here")),
        (None, "auto", Choice("cpu", "no NVIDIA GPU that torch can use")),
        (AMPERE, "gpu", Choice("cuda", "asked for")),
        (AMPERE, "cuda", Choice("cuda", "asked for")),
        (AMPERE, "cpu", Choice("cpu", "asked for")),
    ],
)
def test_torchs_device(machine: Machine, gpu: Gpu | None, wanted: str, choice: Choice) -> None:
    machine.gpu(gpu)
    assert torch_backend.choose_device(wanted) == choice


@pytest.mark.parametrize("wanted", ["gpu", "cuda"])
def test_a_gpu_that_is_not_here_says_what_to_install(machine: Machine, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        torch_backend.choose_device(wanted)
    assert caught.value.what == f"--device {wanted}: torch sees no NVIDIA GPU here."
    assert caught.value.fix == "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu."


def test_mps_is_used_only_when_asked_for(machine: Machine) -> None:
    machine.apple().mps(True)
    assert torch_backend.choose_device("auto").value == "cpu"
    assert torch_backend.choose_device("mps") == Choice("mps", "asked for")


def test_mps_that_is_not_here(machine: Machine) -> None:
    machine.mps(False)
    with pytest.raises(UserError) as caught:
        torch_backend.choose_device("mps")
    assert caught.value.what == "--device mps: torch sees no Metal GPU here."


def test_mlx_on_a_cpu_without_openblas_warns(machine: Machine) -> None:
    machine.mlx_gpu(False, blas=None)
    choice = mlx_backend.choose_device("auto")
    assert (choice.value, choice.why) == ("cpu", "MLX has no GPU here")
    assert "about 15 times slower than it could be" in choice.warning


# --- precision


def test_an_apple_gpu_gets_bf16_and_hears_of_emulation(machine: Machine) -> None:
    machine.apple()
    why = "an Apple GPU takes it (M1 and M2 emulate it: slower but right)"
    assert mlx_backend.choose_precision("auto", "gpu") == Choice("bf16", why)
    assert torch_backend.choose_precision("auto", "mps") == Choice("bf16", why)


@pytest.mark.parametrize(
    ("gpu", "choice"),
    [
        (AMPERE, Choice("bf16", "NVIDIA A100 is Ampere or later")),
        (Gpu("NVIDIA H100", (9, 0), 1), Choice("bf16", "NVIDIA H100 is Ampere or later")),
        (TURING, Choice("fp32", "the GPU is older than Ampere and has no bf16")),
    ],
)
def test_an_nvidia_gpu_gets_bf16_from_ampere_on(machine: Machine, gpu: Gpu, choice: Choice) -> None:
    machine.gpu(gpu)
    assert torch_backend.choose_precision("auto", "cuda") == choice
    assert mlx_backend.choose_precision("auto", "gpu") == choice


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_a_cpu_with_bf16_instructions_gets_bf16(machine: Machine, flag: str) -> None:
    machine.cpu(flag)
    assert torch_backend.choose_precision("auto", "cpu") == Choice("bf16", f"this CPU has {flag}")


def test_a_cpu_without_them_gets_float32(machine: Machine) -> None:
    assert torch_backend.choose_precision("auto", "cpu") == Choice("fp32", "this CPU has no bf16 instructions")


def test_mlx_on_a_cpu_gets_float32_whatever_the_cpu(machine: Machine) -> None:
    machine.cpu("avx512_bf16")
    assert mlx_backend.choose_precision("auto", "cpu") == Choice("fp32", "MLX's bf16 products are very slow on a CPU")


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_a_precision_that_is_asked_for(machine: Machine, wanted: str) -> None:
    machine.gpu(TURING)
    assert torch_backend.choose_precision(wanted, "cuda") == Choice(wanted, "asked for")


# --- the facts themselves


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_bf16", "amx_bf16"),
        ("flags : fpu avx512f avx512_bf16", "avx512_bf16"),
        ("Features : fp asimd bf16", "bf16"),
        ("flags : fpu avx512f", ""),
    ],
)
def test_what_the_cpu_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, flag: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    real = open
    monkeypatch.setattr(hardware, "open", lambda path, **how: real(tmp_path / "cpuinfo", **how), raising=False)
    assert hardware.cpu_bf16() == flag


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def none() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", none)
    assert hardware.nvidia_gpu.__wrapped__() is None


@pytest.mark.parametrize(
    ("system", "machine", "yes"), [("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)]
)
def test_apple_silicon_is_an_arm_mac(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, yes: bool) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert hardware.apple_silicon() is yes

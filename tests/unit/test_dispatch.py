"""Backend, device and precision on machines of every kind, each with its reason."""

import sys
import types
from pathlib import Path

import pytest

from common.errors import UserError
from common.system import hardware
from common.system.hardware import Choice, Gpu, choose_backend, choose_device, choose_precision

AMPERE = Gpu("NVIDIA A100", (8, 0), 1 << 36)
TURING = Gpu("Tesla T4", (7, 5), 1 << 34)


class Machine:
    """The facts that dispatch looks at, set one by one. At first: Linux, no GPU, torch and MLX installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.apple(False).gpu(None).have("torch", "mlx", "mlx_lm").cpu("")

    def apple(self, yes: bool = True) -> "Machine":
        self._patch.setattr(hardware, "apple_silicon", lambda: yes)
        return self

    def gpu(self, gpu: Gpu | None, torch_sees_it: bool = True) -> "Machine":
        self._patch.setattr(hardware, "nvidia_gpu", lambda: gpu)
        self._patch.setattr(hardware, "torch_sees_cuda", lambda: gpu is not None and torch_sees_it)
        return self

    def have(self, *modules: str) -> "Machine":
        self._patch.setattr(hardware, "installed", lambda module: module in modules)
        return self

    def cpu(self, flag: str) -> "Machine":
        self._patch.setattr(hardware, "cpu_bf16", lambda: flag)
        return self

    def mlx_gpu(self, yes: bool) -> "Machine":
        core = types.ModuleType("mlx.core")
        core.gpu = "gpu"  # type: ignore[attr-defined]
        core.is_available = lambda device: yes  # type: ignore[attr-defined]
        package = types.ModuleType("mlx")
        package.core = core  # type: ignore[attr-defined]
        self._patch.setitem(sys.modules, "mlx", package)
        self._patch.setitem(sys.modules, "mlx.core", core)
        self._patch.setattr(hardware, "preload", lambda: "libopenblas.so.0")
        return self

    def mps(self, yes: bool) -> "Machine":
        torch = types.ModuleType("torch")
        mps = types.SimpleNamespace(is_available=lambda: yes)
        torch.backends = types.SimpleNamespace(mps=mps)  # type: ignore[attr-defined]
        self._patch.setitem(sys.modules, "torch", torch)
        return self


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# --- backend


def test_apple_silicon_gets_mlx(machine: Machine) -> None:
    machine.apple()
    assert choose_backend("auto") == Choice("mlx", "this is Apple silicon")


@pytest.mark.parametrize("modules", [("torch",), ("torch", "mlx")])
def test_apple_silicon_without_all_of_mlx_gets_torch_and_is_told(machine: Machine, modules: tuple[str, ...]) -> None:
    machine.apple().have(*modules)
    choice = choose_backend("auto")
    assert choice.value == "torch"
    assert "not installed, though this is Apple silicon" in choice.why


def test_an_nvidia_gpu_gets_torch(machine: Machine) -> None:
    machine.gpu(AMPERE)
    assert choose_backend("auto") == Choice("torch", "an NVIDIA GPU is here")


def test_a_gpu_that_torch_cannot_use_is_none(machine: Machine) -> None:
    machine.gpu(AMPERE, torch_sees_it=False)
    assert choose_backend("auto") == Choice("torch", "no Apple silicon and no NVIDIA GPU that torch can use: the CPU")


def test_a_plain_machine_gets_torch_though_mlx_is_there(machine: Machine) -> None:
    assert choose_backend("auto").value == "torch"


@pytest.mark.parametrize("wanted", ["mlx", "torch"])
def test_a_backend_that_is_asked_for(machine: Machine, wanted: str) -> None:
    assert choose_backend(wanted) == Choice(wanted, "asked for")


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
        choose_backend("mlx")
    assert caught.value.what == f"--backend mlx: {missing.replace('_', '-')} is not installed."
    assert caught.value.fix == fix


def test_torch_that_is_missing_says_what_to_install(machine: Machine) -> None:
    machine.have("mlx", "mlx_lm")
    with pytest.raises(UserError, match="torch is not installed") as caught:
        choose_backend("torch")
    assert caught.value.fix == "pip install torch"


# --- device


@pytest.mark.parametrize(
    ("gpu", "wanted", "choice"),
    [
        (True, "auto", Choice("gpu", "MLX has a GPU here")),
        (False, "auto", Choice("cpu", "MLX has no GPU here")),
        (True, "gpu", Choice("gpu", "asked for")),
        (True, "cpu", Choice("cpu", "asked for")),
    ],
)
def test_mlxs_device(machine: Machine, gpu: bool, wanted: str, choice: Choice) -> None:
    machine.mlx_gpu(gpu)
    assert choose_device(wanted, "mlx") == choice


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
        choose_device(wanted, "mlx")
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
    assert choose_device(wanted, "torch") == choice


@pytest.mark.parametrize("wanted", ["gpu", "cuda"])
def test_a_gpu_that_is_not_here_says_what_to_install(machine: Machine, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(wanted, "torch")
    assert caught.value.what == f"--device {wanted}: torch sees no NVIDIA GPU here."
    assert caught.value.fix == "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu."


def test_mps_is_used_only_when_asked_for(machine: Machine) -> None:
    machine.apple().mps(True)
    assert choose_device("auto", "torch").value == "cpu"
    assert choose_device("mps", "torch") == Choice("mps", "asked for")


def test_mps_that_is_not_here(machine: Machine) -> None:
    machine.mps(False)
    with pytest.raises(UserError) as caught:
        choose_device("mps", "torch")
    assert caught.value.what == "--device mps: torch sees no Metal GPU here."


# --- precision


def test_an_apple_gpu_gets_bf16_and_hears_of_emulation(machine: Machine) -> None:
    machine.apple()
    why = "an Apple GPU takes it (M1 and M2 emulate it: slower but right)"
    assert choose_precision("auto", "mlx", "gpu") == Choice("bf16", why)
    assert choose_precision("auto", "torch", "mps") == Choice("bf16", why)


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
    assert choose_precision("auto", "torch", "cuda") == choice
    assert choose_precision("auto", "mlx", "gpu") == choice


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_a_cpu_with_bf16_instructions_gets_bf16(machine: Machine, flag: str) -> None:
    machine.cpu(flag)
    assert choose_precision("auto", "torch", "cpu") == Choice("bf16", f"this CPU has {flag}")


def test_a_cpu_without_them_gets_float32(machine: Machine) -> None:
    assert choose_precision("auto", "torch", "cpu") == Choice("fp32", "this CPU has no bf16 instructions")


def test_mlx_on_a_cpu_gets_float32_whatever_the_cpu(machine: Machine) -> None:
    machine.cpu("avx512_bf16")
    assert choose_precision("auto", "mlx", "cpu") == Choice("fp32", "MLX's bf16 products crawl on a CPU")


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_a_precision_that_is_asked_for(machine: Machine, wanted: str) -> None:
    machine.gpu(TURING)
    assert choose_precision(wanted, "torch", "cuda") == Choice(wanted, "asked for")


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

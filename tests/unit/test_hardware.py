"""Backend, device and precision on machines of every kind, each with its reason."""

import inspect
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import mlx_backend
import torch_backend
from common.backend_package import BackendPackage, Choice
from common.commands.doctor import doctor
from common.commands.prepare import choose_hardware
from common.errors import UserError
from common.memory_terms import MemoryTerms
from common.options import Options
from common.system import hardware
from common.system.cgroup import Limit
from common.system.hardware import Gpu, choose_backend
from tests.contexts import context
from torch_backend.devices import Card

NO_GPU = "no Apple silicon and no NVIDIA GPU that torch can use: the CPU"
AMPERE = Card("NVIDIA A100", (8, 0), "a100")
TURING = Card("Tesla T4", (7, 5), "t4")
HOPPER = Card("NVIDIA H100", (9, 0), "h100")
PART = (
    'pip install "twintune[mlx-cpu]", or in a checkout: pip install -e ".[mlx-cpu]"'
    " (with an NVIDIA GPU mlx-cuda12 or mlx-cuda13)"
)


class Machine:
    """The facts that the choice looks at, set one by one. At first: Linux, no GPU, torch and MLX installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._patch.setattr(hardware, "_has_mlx_library", lambda: True)
        self.apple(False).gpus().have("torch", "mlx", "mlx_lm").cpu("")

    def _set(self, name: str, value: object) -> "Machine":
        """In every module that has taken the function over."""
        for module in (hardware, torch_backend.devices, mlx_backend.devices):
            if hasattr(module, name):
                self._patch.setattr(module, name, value)
        return self

    def apple(self, yes: bool = True) -> "Machine":
        return self._set("apple_silicon", lambda: yes)

    def gpus(self, *cards: Card, free: dict[str, int | None] | None = None) -> "Machine":
        """What torch sees, in its order; free: bytes by `uuid`."""
        return self._set("cards", lambda: list(cards))._set("nvidia_free", lambda uuid: (free or {})[uuid])

    def have(self, *modules: str) -> "Machine":
        return self._set("installed", lambda module: module in modules)

    def cpu(self, flag: str) -> "Machine":
        return self._set("cpu_bf16", lambda: flag)

    def mlx_gpu(self, *cards: dict[str, Any], blas: str | None = "libopenblas.so.0", limit: int = 10**12) -> "Machine":
        """cards: what MLX's device_info says of each."""
        core = types.SimpleNamespace(
            gpu="gpu",
            is_available=lambda device: bool(cards),
            device_count=lambda device: len(cards),
            device_info=lambda device: cards[0],
            get_memory_limit=lambda: limit,
        )
        return self._set("import_mlx", lambda: core)._set("preload", lambda: blas)

    def mps(self, yes: bool) -> "Machine":
        torch = types.ModuleType("torch")
        mps = types.SimpleNamespace(is_available=lambda: yes)
        torch.backends = types.SimpleNamespace(mps=mps)  # type: ignore[attr-defined]
        self._patch.setitem(sys.modules, "torch", torch)
        return self


def mlx_cuda(card: Card, free: int = 0) -> dict[str, Any]:
    """As MLX's device_info describes an NVIDIA GPU: without the sizes that Metal recommends."""
    major, minor = card.capability
    capability = {"compute_capability_major": major, "compute_capability_minor": minor}
    return {"device_name": card.name, "total_memory": 24 << 30, "free_memory": free, **capability}


METAL = {"device_name": "Apple M4", "memory_size": 16 << 30, "max_recommended_working_set_size": 11 << 30}


def packages(name: str) -> BackendPackage:
    return {"torch": torch_backend, "mlx": mlx_backend}[name]  # type: ignore[return-value]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# --- backend


def test_apple_silicon_gets_mlx(machine: Machine) -> None:
    machine.apple().mlx_gpu(METAL)
    assert choose_backend("auto", packages) == Choice("mlx", "this is Apple silicon")


@pytest.mark.parametrize("modules", [("torch",), ("torch", "mlx")])
def test_apple_silicon_without_all_of_mlx_gets_torch_and_is_told(machine: Machine, modules: tuple[str, ...]) -> None:
    machine.apple().have(*modules)
    choice = choose_backend("auto", packages)
    assert choice.value == "torch"
    assert re.fullmatch("this is Apple silicon, but mlx(-lm)? is not installed", choice.why)
    assert choice.warning == ""


def test_an_nvidia_gpu_gets_torch(machine: Machine) -> None:
    machine.gpus(AMPERE)
    assert choose_backend("auto", packages) == Choice("torch", "an NVIDIA GPU is here")


def test_a_plain_machine_gets_torch_though_mlx_is_there(machine: Machine) -> None:
    assert choose_backend("auto", packages).value == "torch"


@pytest.mark.parametrize("wanted", ["mlx", "torch"])
def test_a_backend_that_is_asked_for(machine: Machine, wanted: str) -> None:
    assert choose_backend(wanted, packages) == Choice(wanted, "asked for")


@pytest.mark.parametrize(
    ("system", "missing", "fix"),
    [
        ("linux", "mlx", PART),
        ("linux", "mlx_lm", PART),
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
    monkeypatch.setattr(torch_backend.devices, "nvidia_gpus", lambda: [])
    monkeypatch.setattr(mlx_backend.devices, "preload", lambda: None)
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
        ([METAL], "auto", Choice("gpu", "MLX has a GPU here")),
        ([], "auto", Choice("cpu", "MLX has no GPU here; libopenblas.so.0 computes its products")),
        ([METAL], "gpu", Choice("gpu", "asked for")),
        ([METAL], "cpu", Choice("cpu", "asked for; libopenblas.so.0 computes its products")),
        (
            [mlx_cuda(AMPERE), mlx_cuda(TURING)],
            "auto",
            Choice("gpu", "MLX has a GPU here; the first of 2, NVIDIA A100: CUDA_VISIBLE_DEVICES chooses another"),
        ),
    ],
)
def test_mlxs_device(machine: Machine, gpu: list[dict[str, Any]], wanted: str, choice: Choice) -> None:
    machine.mlx_gpu(*gpu)
    assert mlx_backend.choose_device(wanted) == choice


@pytest.mark.parametrize(
    ("gpu", "wanted", "said", "fix"),
    [
        ([], "gpu", "--device gpu: this MLX sees no GPU.", "Use --device cpu, or install mlx-cuda12 or -13."),
        ([METAL], "cuda", "--device cuda is torch's; MLX has cpu and gpu.", "Use --device gpu, or auto."),
        ([METAL], "mps", "--device mps is torch's; MLX has cpu and gpu.", "Use --device gpu, or auto."),
        (
            [mlx_cuda(AMPERE), mlx_cuda(TURING)],
            "cuda:1",
            "--device cuda:1 is torch's; MLX has cpu and gpu.",
            "Use --device gpu with CUDA_VISIBLE_DEVICES=1 in the environment.",
        ),
    ],
)
def test_a_device_that_mlx_lacks(machine: Machine, gpu: list[dict[str, Any]], wanted: str, said: str, fix: str) -> None:
    machine.mlx_gpu(*gpu)
    with pytest.raises(UserError) as caught:
        mlx_backend.choose_device(wanted)
    assert (caught.value.what, caught.value.fix) == (said, fix)


@pytest.mark.parametrize(
    ("gpus", "wanted", "choice"),
    [
        ([AMPERE], "auto", Choice("cuda", "an NVIDIA GPU is here")),
        ([], "auto", Choice("cpu", "no NVIDIA GPU that torch can use")),
        ([AMPERE], "gpu", Choice("cuda", "asked for")),
        ([AMPERE], "cuda", Choice("cuda", "asked for")),
        ([AMPERE], "cpu", Choice("cpu", "asked for")),
        ([TURING, AMPERE], "cuda:1", Choice("cuda:1", "asked for: NVIDIA A100")),
        ([TURING, AMPERE], "cuda:0", Choice("cuda:0", "asked for: Tesla T4")),
    ],
)
def test_torchs_device(machine: Machine, gpus: list[Card], wanted: str, choice: Choice) -> None:
    machine.gpus(*gpus)
    assert torch_backend.choose_device(wanted) == choice


@pytest.mark.parametrize("wanted", ["auto", "cuda", "gpu"])
def test_the_freest_of_several_gpus_is_taken_and_said(machine: Machine, wanted: str) -> None:
    machine.gpus(TURING, AMPERE, HOPPER, free={"t4": 3 * 10**9, "a100": 40 * 10**9, "h100": 20 * 10**9})
    why = "the freest of 3 NVIDIA GPUs: NVIDIA A100, 40.0 GB free"
    assert torch_backend.choose_device(wanted) == Choice("cuda:1", why)


def test_a_gpu_by_a_number_that_torch_does_not_count(machine: Machine) -> None:
    machine.gpus(TURING, AMPERE)
    with pytest.raises(UserError) as caught:
        torch_backend.choose_device("cuda:2")
    assert caught.value.what == "--device cuda:2: there is no such GPU."
    assert caught.value.fix == "torch sees cuda:0 (Tesla T4), cuda:1 (NVIDIA A100)."


@pytest.mark.parametrize("wanted", ["gpu", "cuda", "cuda:1"])
def test_a_gpu_that_is_not_here_says_what_to_install(machine: Machine, wanted: str) -> None:
    with pytest.raises(UserError) as caught:
        torch_backend.choose_device(wanted)
    assert caught.value.what == f"--device {wanted}: torch sees no NVIDIA GPU here."
    assert caught.value.fix == "Install NVIDIA's driver and a CUDA build of torch, or use --device cpu."


@pytest.mark.parametrize(
    ("driver", "hip", "visible", "said"),
    [
        (True, "6.4", [("AMD Instinct MI300X", 9, "mi300x")], True),
        (True, "6.4", [], False),  # no device that it can use
        (True, None, [], False),  # a CPU or CUDA build
        (False, "6.4", [("AMD Instinct MI300X", 9, "mi300x")], False),
    ],
)
def test_an_amd_gpu_that_torch_sees_is_not_left_alone_silently(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: bool,
    hip: str | None,
    visible: list[tuple[str, int, str]],
    said: bool,
) -> None:
    torch = cuda(visible)
    torch.version = types.SimpleNamespace(hip=hip)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch_backend.devices, "AMD_DRIVER", tmp_path if driver else tmp_path / "kfd")
    warning = "torch sees an AMD GPU, but Twintune was never run on ROCm: the CPU computes" if said else ""
    assert torch_backend.choose_device("auto") == Choice("cpu", "no NVIDIA GPU that torch can use", warning)
    assert torch_backend.choose_device("cpu").warning == ""


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
    machine.mlx_gpu(blas=None)
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
        (HOPPER, Choice("bf16", "NVIDIA H100 is Ampere or later")),
        (TURING, Choice("fp32", "Tesla T4 is older than Ampere and has no bf16")),
    ],
)
def test_an_nvidia_gpu_gets_bf16_from_ampere_on(machine: Machine, gpu: Card, choice: Choice) -> None:
    machine.gpus(gpu).mlx_gpu(mlx_cuda(gpu))
    assert torch_backend.choose_precision("auto", "cuda") == choice
    assert mlx_backend.choose_precision("auto", "gpu") == choice


def test_the_gpu_that_computes_decides_the_precision(machine: Machine) -> None:
    machine.gpus(TURING, HOPPER)
    assert torch_backend.choose_precision("auto", "cuda:0").value == "fp32"
    assert torch_backend.choose_precision("auto", "cuda:1").value == "bf16"


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
    machine.gpus(TURING)
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
    assert hardware.cpu_bf16.__wrapped__() == flag


class Nvml:
    """The driver of a machine with a V100 first and an H100 second, by PCI bus; in pynvml's place."""

    class NVMLError(Exception):
        pass

    gpus = (("Tesla V100", "GPU-v100", 16), ("NVIDIA H100", "GPU-h100", 80))

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        found = [index for index, gpu in enumerate(self.gpus) if gpu[1] == uuid]
        if not found:
            raise self.NVMLError("not found")
        return found[0]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        size = self.gpus[handle][2] * 10**9
        return types.SimpleNamespace(total=size, free=size // (handle + 2))


def cuda(visible: list[tuple[str, int, str]]) -> types.ModuleType:
    """torch whose CUDA sees these GPUs in this order: `(name, major version, uuid)`."""
    torch = types.ModuleType("torch")
    found = [types.SimpleNamespace(name=name, major=major, minor=0, uuid=uuid) for name, major, uuid in visible]
    torch.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: bool(found),
        device_count=lambda: len(found),
        get_device_properties=lambda index: found[index],
        mem_get_info=lambda index: ((index + 1) * 10**9, 80 * 10**9),
    )
    return torch


V100, H100 = ("Tesla V100", 7, "v100"), ("NVIDIA H100", 9, "h100")


@pytest.mark.parametrize(
    ("visible", "device", "precision"),
    [
        ([H100], "cuda", "bf16"),  # CUDA_VISIBLE_DEVICES=1
        ([V100], "cuda", "fp32"),  # CUDA_VISIBLE_DEVICES=0
        ([H100, V100], "cuda:0", "bf16"),  # CUDA counts the fastest first
        ([], "cpu", "fp32"),  # CUDA_VISIBLE_DEVICES= or a CPU build
    ],
)
def test_what_torch_sees_is_what_counts_not_the_drivers_order(
    monkeypatch: pytest.MonkeyPatch, visible: list[tuple[str, int, str]], device: str, precision: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch", cuda(visible))
    monkeypatch.setattr(torch_backend.devices, "cpu_bf16", lambda: "")
    chosen = torch_backend.choose_device("auto").value
    assert chosen == device
    assert torch_backend.choose_precision("auto", chosen).value == precision


def test_a_gpu_that_the_driver_does_not_know_by_its_uuid_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch", cuda([("MIG 1g.10gb", 9, "a"), ("MIG 2g.20gb", 9, "b")]))
    why = "the freest of 2 NVIDIA GPUs: MIG 2g.20gb, 2.0 GB free"
    assert torch_backend.choose_device("auto") == Choice("cuda:1", why)


def test_free_memory_is_of_the_gpu_that_computes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", cuda([V100, H100]))
    assert torch_backend.free_memory("cuda:1") == (2 * 10**9, "the GPU's free memory")
    card = mlx_cuda(AMPERE, free=23 << 30)
    machine.mlx_gpu(card)
    assert mlx_backend.free_memory("gpu") == (23 << 30, "the GPU's free memory")
    machine.mlx_gpu(card, limit=19 << 30)  # MLX's own, of the start
    assert mlx_backend.free_memory("gpu")[0] == 19 << 30


@pytest.mark.parametrize("wired", [2, 9])
def test_an_apple_gpu_may_take_what_other_programs_keep_but_do_not_need(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, wired: int
) -> None:
    import psutil

    memory = types.SimpleNamespace(total=16 << 30, available=4 << 30, wired=wired << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(sys, "platform", "darwin")
    machine.apple().mlx_gpu(METAL)
    expected = {2: 10 << 30, 9: 4 << 30}[wired]  # all but a quarter and what is wired, or what is available
    assert mlx_backend.free_memory("gpu") == (expected, "what a GPU may take of the memory")


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def none() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", none)
    assert hardware.nvidia_gpus() == []
    assert hardware.nvidia_free("h100") is None


def test_the_driver_lists_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    assert hardware.nvidia_gpus() == [Gpu("Tesla V100", 16 * 10**9), Gpu("NVIDIA H100", 80 * 10**9)]


def test_a_gpu_that_computes_in_the_cpus_memory_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int) -> Any:
        raise Nvml.NVMLError("Not Supported")

    driver = Nvml()
    monkeypatch.setattr(driver, "nvmlDeviceGetMemoryInfo", none)
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    assert hardware.nvidia_gpus() == [Gpu("Tesla V100", None), Gpu("NVIDIA H100", None)]
    assert hardware.nvidia_free("GPU-h100") is None
    doctor(context("plain"))
    assert "NVIDIA H100, no memory of its own reported" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(("affinity", "quota", "cores"), [(8, None, 8), (8, 1.5, 2), (8, 0.2, 1), (2, 6.0, 2)])
def test_cores_are_those_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, affinity: int, quota: float | None, cores: int
) -> None:
    import psutil

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(hardware, "core_limit", lambda: quota and Limit(quota, Path("cpu.max")))
    assert hardware.cores() == cores
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    assert hardware.physical_cores() == min(4, cores)


@pytest.mark.parametrize(
    ("system", "machine", "yes"), [("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)]
)
def test_apple_silicon_is_an_arm_mac(monkeypatch: pytest.MonkeyPatch, system: str, machine: str, yes: bool) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert hardware.apple_silicon() is yes

"""The stages of each export, and the memory and disk that each takes: estimated, then measured."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from common.display import Display, gigabytes
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import DTYPES, StoredTensor
from common.system.cache import cache_folder
from common.system.disk import require_disk
from common.system.memory import PeakMemory, available
from common.training.metrics import timed

# The stages of each `--export` after training, in order; stated here only.
EXPORT_STEPS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fused": ("fuse",),
    "gguf": ("fuse", "convert", "quantize"),
    "lora-gguf": ("lora",),
    "mlx": ("fuse", "mlx"),
}
_LLAMA = {"convert", "lora"}  # stages that run llama.cpp's converters
_MB = 10**6


@dataclass(frozen=True)
class Stage:
    """memory: bytes beyond those held before the stage, its subprocesses' included; disk: bytes written to the run.

    temporary: bytes written where the system keeps temporary files.
    """

    name: str
    memory: int
    disk: int
    temporary: int = 0


def needs_llama(export: str) -> bool:
    return bool(_LLAMA & set(EXPORT_STEPS[export]))


def estimate_stages(
    export: str,
    quants: list[str],
    base: ModelFolder,
    adapter_bytes: int,
    held: int = 0,
    also: Collection[str] = (),
    mlx_bits: int = 4,
) -> list[Stage]:
    """The estimate of every stage of `export` from `base`.

    adapter_bytes: of what was trained, in float32. held: bytes of a quantized base that is loaded again to be fused
    into. also: optional stages: imatrix, split, verify. mlx_bits: of a weight, at most. The figures were measured:
    blocks of 16 MB fuse; llama.cpp's converter holds the largest tensor in float32 twice, its quantizer once and
    quantized; mlx-lm holds all it will write, and the largest tensor.
    """
    tensors = [tensor for tensor in base.tensors.values() if tensor.dtype in DTYPES]
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    largest, bf16_bytes = max(sizes), 2 * sum(sizes)
    quantized = sum(_in_bits(tensor, mlx_bits) for tensor in tensors)
    weights = base.weight_bytes
    tokenizer = sum(file.stat().st_size for file in base.path.glob("tokenizer*"))
    kept = [quant for quant in quants if quant != "BF16"]  # the conversion writes that one
    each = 8.0 if "F32" in kept else 6.0 if "F16" in kept else 5.1
    written = [bf16_bytes * 2 if q == "F32" else bf16_bytes if q == "F16" else bf16_bytes * 5 // 8 for q in kept]
    known = {
        "fuse": Stage("fuse", 120 * _MB + held + (4 * largest if held else 0), weights + tokenizer),
        "convert": Stage("convert", 400 * _MB + 8 * largest, bf16_bytes),
        "quantize": Stage(
            "quantize",
            (400 * _MB if "F32" in kept else 110 * _MB) + round(each * largest) if kept else 0,
            sum(written),
        ),
        "split": Stage("split", 30 * _MB + largest * 4, sum(written) + (bf16_bytes if "BF16" in quants else 0)),
        "imatrix": Stage("imatrix", 500 * _MB + 2 * largest, 0),
        "verify": Stage("verify", 1100 * _MB + 2 * bf16_bytes, 0),  # in float32, beside the reference's distributions
        "lora": Stage("lora", 350 * _MB + 3 * adapter_bytes, adapter_bytes + _MB, adapter_bytes + _MB),
        "mlx": Stage("mlx", 200 * _MB + quantized + round(2.6 * largest), quantized + tokenizer),
    }
    through = list(EXPORT_STEPS[export])
    if "quantize" in through:
        at = through.index("quantize")
        through[at:at] = ["imatrix"] if "imatrix" in also else []
        through += [name for name in ("split", "verify") if name in also]
    return [known[name] for name in through]


def _in_bits(tensor: StoredTensor, bits: int) -> int:
    """Bytes of a tensor after mlx-lm's quantization: 64 values of a row share a scale and a bias."""
    size, each = math.prod(tensor.shape), DTYPES[tensor.dtype].itemsize
    if len(tensor.shape) == 2 and tensor.shape[1] % 64 == 0:
        return size * bits // 8 + 2 * each * size // 64
    return size * each


def check_disk(run: Path, stages: list[Stage], build: int = 0) -> None:
    """Raises UserError where a disk has less free than will be written there: of the run, the cache, temporary files.

    build: bytes of a build of llama.cpp that has to be made.
    """
    writes = [(run, stage.name, stage.disk) for stage in stages]
    writes += [(Path(gettempdir()), f"{stage.name}, temporary", stage.temporary) for stage in stages if stage.temporary]
    writes += [(cache_folder(), "building llama.cpp", build)] if build else []
    require_disk(
        writes,
        "Free some space, give --output on another disk, or stop earlier with --export fused or none.",
    )


def warn_of_memory(stages: list[Stage], display: Display) -> None:
    """Warn before training of stages after it that need more memory than is free."""
    free = available()
    for stage in stages:
        if stage.memory > free:
            display.warn(
                f"stage {stage.name!r} after training needs about {gigabytes(stage.memory)}, {gigabytes(free)} are "
                "free now: it may swap, or fail. What was trained is kept: close other programs, or train with "
                "--export none and run `fuse` on a machine with more"
            )


class StageMeter:
    """What the stages of one export take, beside the estimate. `seconds` gets the time of each."""

    def __init__(self, estimated: list[Stage], seconds: dict[str, float]) -> None:
        self._estimated = {stage.name: stage for stage in estimated}
        self._seconds = seconds
        self.measured: dict[str, Stage] = {}

    @contextmanager
    def stage(self, name: str, wrote: Path) -> Iterator[None]:
        """Around a stage, or a part of it; `wrote` is the file or folder that it leaves."""
        with timed(self._seconds, name), PeakMemory() as extra:
            yield
        files = [wrote] if wrote.is_file() else wrote.rglob("*")
        disk = sum(file.stat().st_size for file in files if file.is_file())
        before = self.measured.get(name, Stage(name, 0, 0))
        self.measured[name] = Stage(name, max(before.memory, extra.peak), before.disk + disk)

    def record(self) -> dict[str, dict[str, int]]:
        """Measured and estimated bytes by stage, for run.json."""
        return {
            name: {
                "memory": found.memory,
                "predicted_memory": self._estimated[name].memory,
                "disk": found.disk,
                "predicted_disk": self._estimated[name].disk,
            }
            for name, found in self.measured.items()
        }

    def show(self, display: Display) -> None:
        rows = [
            [name, f"{self._seconds[name]:.1f} s", *map(gigabytes, figures.values())]
            for name, figures in self.record().items()
        ]
        if rows:
            display.table("Export", ["stage", "time", "memory", "estimated", "disk", "estimated"], rows)

"""A GGUF in several files of limited size, which llama.cpp reads as one; split by its own `llama-gguf-split`."""

import math
from pathlib import Path

from common.backend import Progress
from common.errors import UserError
from common.llama_cpp.build import add_tool, own
from common.llama_cpp.gguf_file import read_tensors
from common.llama_cpp.install import LlamaCpp, llama_environment
from common.models.model_folder import ModelFolder
from common.system.process import run_logged

_TOOL = "llama-gguf-split"
_UNIT = 10**6  # the tool takes a whole number of these


def split_tool(llama: LlamaCpp, progress: Progress) -> Path:
    """The path of `llama-gguf-split`: that of `llama`, else of our own build, where it is compiled when first needed.

    Raises UserError where that fails.
    """
    beside = llama.quantize.with_name(_TOOL + llama.quantize.suffix)
    return beside if beside.is_file() else add_tool(own(progress), _TOOL, progress)


def check_split(size: int, quants: list[str], base: ModelFolder) -> None:
    """UserError where a file of `size` bytes cannot hold the largest tensor, which is never cut."""
    bytes_each = max({"F32": 4.0, "BF16": 2.0, "F16": 2.0}.get(quant, 1.1) for quant in quants)
    vocabulary = sum(file.stat().st_size for file in base.path.glob("tokenizer*.json"))  # the GGUF's is smaller
    needed = round(max(math.prod(tensor.shape) for tensor in base.tensors.values()) * bytes_each) + vocabulary + _UNIT
    if size < needed:
        raise UserError(
            f"--split-size: the largest tensor of this model takes about {needed / _UNIT:.0f} MB with the vocabulary, "
            f"and is never cut; {size / _UNIT:.0f} MB is less.",
            f"Give {needed // _UNIT + 1}MB or more.",
        )


def split(gguf: Path, size: int, tool: Path, scratch: Path) -> list[Path]:
    """The files `<name>-00001-of-00003.gguf` ... of at most `size` bytes in `scratch`; none where `gguf` is no larger.

    `gguf` stays as it is. Raises UserError with the tool's last lines.
    """
    if (whole := gguf.stat().st_size) <= size:
        return []
    sizes = _tensor_sizes(gguf)
    room = max((size - whole + sum(sizes)) // _UNIT, math.ceil(max(sizes) / _UNIT))  # the tool counts tensors alone
    log = gguf.with_name(f"{gguf.name}.log")
    log.unlink(missing_ok=True)
    command = [str(tool), "--split-max-size", f"{room}M", str(gguf), str(scratch / gguf.stem)]
    code, tail = run_logged(command, log, lambda line: None, llama_environment())
    made = sorted(scratch.glob("*.gguf"))
    if code != 0 or not made:
        raise UserError(
            f"splitting {gguf.name} failed (exit status {code}). Its log, {log}, ends with:\n{tail}",
            "Look at the free disk space, or leave --split-size out.",
        )
    log.unlink()
    return made


def _tensor_sizes(gguf: Path) -> list[int]:
    """Bytes of each tensor's data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes = []
    for tensor in read_tensors(gguf):
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.code)]
        sizes.append(math.prod(tensor.shape) // values_per_block * bytes_per_block)
    return sizes

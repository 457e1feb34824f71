"""A LoRA adapter as a GGUF of its own, which llama.cpp adds to a base GGUF with `--lora`.

llama.cpp's own converter writes it, and shows how to read one: which names and row orders it gives to modules.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Adapter, LoraWeight
from common.errors import UserError, first_line
from common.files import atomic_write, scratch_folder
from common.llama_cpp.convert import complete_config, lacks_mtp
from common.llama_cpp.convertible import other_model
from common.llama_cpp.install import LlamaCpp
from common.model_files import scrubbed
from common.models.adapter_files import times, write_peft
from common.models.gguf_import import gguf_value, open_gguf
from common.models.lora_init import Shapes
from common.models.model_folder import CONFIG_FILE, ModelFolder
from common.system.process import offline_environment, run_logged

_SCRIPT = "convert_lora_to_gguf.py"
_REMEDY = f"Give a LoRA GGUF, made by {_SCRIPT}."


def check_lora(method: str) -> None:
    """UserError for DoRA and full fine-tuning: a GGUF LoRA holds A, B and one alpha."""
    if method != "lora":
        kind = "DoRA's row lengths" if method == "dora" else "the weights of full fine-tuning"
        raise UserError(
            f"A GGUF LoRA cannot hold {kind}.", "Fuse them into the model (--export gguf), or train with --method lora."
        )


def check_lora_base(base: ModelFolder) -> None:
    """UserError where llama.cpp's converter cannot read the base of an adapter."""
    if lacks_mtp(base):
        raise UserError(
            f"llama.cpp converts no adapter of {base.path}: it wants the layers that predict more tokens (mtp), which "
            "this Qwen3.5 lacks.",
            "Use the GGUF of the fused model (--export gguf), or adapt the complete model as the hub has it.",
        )


def check_lora_model(base: ModelFolder) -> None:
    """UserError where llama.cpp computes another base than the one that the adapter was trained on."""
    if fault := other_model(base):
        raise UserError(f"{base.path}: {fault}.", "Use the fused model (--export fused).")


def lora_script(llama: LlamaCpp) -> Path:
    """The path of llama.cpp's converter for adapters. UserError where it is not there."""
    script = llama.converter.with_name(_SCRIPT)
    if not script.is_file():
        raise UserError(f"{llama.where} has no {_SCRIPT}.", "Name a complete llama.cpp checkout with --llama-cpp DIR.")
    return script


def write_gguf_lora(adapter: Adapter, base: Path, out: Path, llama: LlamaCpp) -> None:
    """Write `adapter` to `out` as a float32 LoRA GGUF for the base model in `base`.

    The file has one alpha, and llama.cpp scales each matrix by `alpha / rank`. Where rsLoRA or a pattern scales
    otherwise, the factor goes into B. Raises UserError for DoRA and full fine-tuning, which such a file cannot hold.
    """
    check_lora(adapter.method)
    # llama.cpp reads an alpha of 0, here or once it is float32, as no alpha at all
    alpha = next((weight.alpha for weight in adapter.weights.values() if np.float32(weight.alpha)), 1.0)
    weights = {}
    for name, weight in adapter.weights.items():
        factor = weight.scale / (alpha / weight.rank)
        weights[name] = LoraWeight(weight.A, weight.B if factor == 1 else times(weight.B, factor, name), alpha)
    _convert(replace(adapter, weights=weights), base, out, llama)


def holds_experts(path: Path) -> bool:
    """Whether the LoRA GGUF adapts experts of a mixture, which it stacks."""
    return any(len(tensor.shape) == 3 for tensor in open_gguf(path, _REMEDY).tensors)


def read_gguf_lora(path: Path, base: Path, shapes: Shapes, llama: LlamaCpp) -> Adapter:
    """The adapter in a LoRA GGUF, under the base model's Hugging Face names and with its order of rows.

    The converter's names and orders are read from a numbered adapter that it converts: each B holds row numbers, each A
    the module's number and column numbers. `shapes` are all linear modules of the base, and its experts' where the
    file `holds_experts`. Raises UserError where they do not fit.
    """
    modules = sorted(shapes)
    numbered = {}
    for number, name in enumerate(modules):
        out_features, in_features = shapes[name]
        A = np.stack([np.full(in_features, number), np.arange(in_features)]).astype(np.float32)
        rows = np.arange(out_features)
        numbered[name] = LoraWeight(A, np.stack([rows, 0 * rows], axis=1).astype(np.float32), 1.0)
    with scratch_folder() as folder:
        _convert(Adapter("", 0, 0.0, numbered), base, folder / "numbered.gguf", llama)
        known, _ = _tensors(folder / "numbered.gguf")
    tensors, alpha = _tensors(path)
    weights: dict[str, LoraWeight] = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_a"):
            continue
        stem = key.removesuffix(".lora_a")
        A, B = tensors[key], tensors.get(f"{stem}.lora_b")
        if B is None or key not in known:
            raise UserError(
                f"{path}: the model in {base} has no layer for {stem}.", "Give the adapter's own base model."
            )
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise UserError(f"{path}: {stem} has matrices of {A.shape} and {B.shape}, which is no LoRA.", _REMEDY)
        rows, columns = known[f"{stem}.lora_b"][:, 0].astype(int), known[key][1].astype(int)
        if (len(rows), len(columns)) != (len(B), A.shape[1]):
            raise UserError(
                f"{path}: {stem} has {len(B)} rows and {A.shape[1]} columns, the model in {base} has {len(rows)} and "
                f"{len(columns)}.",
                "Give its own base model.",
            )
        name = modules[int(known[key][0, 0])]
        own_A, own_B = np.empty_like(A), np.zeros((shapes[name][0], B.shape[1]), B.dtype)
        own_A[:, columns], own_B[rows] = A, B
        if name in weights:  # a Granite 4's gate and up, whose rows the file has apart
            if not np.array_equal(own_A, weights[name].A):
                raise UserError(
                    f"{path}: the parts of {name} were adapted each for itself.",
                    "Fuse it with llama.cpp's llama-export-lora.",
                )
            own_B += weights[name].B
        weights[name] = LoraWeight(own_A, own_B, alpha or float(B.shape[1]))
    if not weights:
        raise UserError(f"{path} holds no LoRA matrices.", _REMEDY)
    return Adapter("", 0, 0.0, weights)


def _convert(adapter: Adapter, base: Path, out: Path, llama: LlamaCpp) -> None:
    check_lora_base(ModelFolder(base))
    script = lora_script(llama)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as temporary, atomic_write(out) as partial:
        folder, log = temporary / "adapter", temporary / "log"
        write_peft(folder, adapter)
        with scrubbed(base, weights=True) as clean:
            complete_config(clean / CONFIG_FILE)
            command = [sys.executable, str(script), str(folder), "--base", str(clean), "--outtype", "f32"]
            command += ["--outfile", str(partial)]
            code, tail = run_logged(command, log, lambda line: None, offline_environment())
        if code:
            raise UserError(
                f"llama.cpp cannot convert this adapter:\n{tail}",
                "Adapt other layers (--targets), or fuse the adapter and convert the fused model.",
            )


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], float]:
    """Float32 tensors by name, and the file's alpha."""
    reader = open_gguf(path, _REMEDY)
    alpha = gguf_value(reader, "adapter.lora.alpha", path, _REMEDY)
    if alpha is None:
        raise UserError(f"{path} is a GGUF, but not a LoRA adapter.", _REMEDY)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{path}: its alpha is {alpha!r}.", _REMEDY)
    tensors = {tensor.name: _values(tensor, path) for tensor in reader.tensors}
    return dict(part for name, values in tensors.items() for part in _by_expert(name, values)), float(alpha)


def _by_expert(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensor; of a stack each expert's, with its number in the name."""
    if values.ndim != 3:
        yield name, values
        return
    stem, _, part = name.rpartition(".")
    for number, own in enumerate(values):
        yield f"{stem}, expert {number}.{part}", own


def _values(tensor: Any, path: Path) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:  # a type that it does not know, a row that is not made of whole blocks
        raise UserError(f"{path}: {tensor.name!r} cannot be read: {first_line(error)}", _REMEDY) from None
    return values.astype(np.float32)

"""`adapter inspect` and `adapter convert`: anyone's adapter, looked at and rewritten."""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.backend import Adapter, LoraWeight
from common.commands.arguments import add_llama, check_llama
from common.context import Context
from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import check_lora_model, holds_experts, read_gguf_lora, write_gguf_lora
from common.models.adapter_files import read_any, write_mlx, write_peft
from common.models.experts import has_experts, stack_of
from common.models.families import is_multimodal
from common.models.lora_init import layer_count, layer_number, validate
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.option_fields import EXPERTS


def inspect_adapter(path: Path, model: str | None, context: Context) -> None:
    """Print what an adapter is: method, layers, ranks, scales, and how far it moves each kind of layer."""
    display = context.display
    adapter = _read(path, model, context)[0]
    weights = adapter.weights.values()
    layers = _ranges(sorted(set(map(layer_number, adapter.weights))))
    display.panel(
        str(path),
        {
            "method": "DoRA" if adapter.dora else "rsLoRA" if next(iter(weights)).rslora else "LoRA",
            "base model": adapter.base_model or "not named",
            "modules": f"{len(adapter.weights)} in layers {layers}",
            "parameters": f"{sum(part.size for weight in weights for part in weight.parts().values()):,}",
            "dropout": f"{adapter.dropout:g}",
        },
    )
    kinds: dict[tuple[str, int, float, float], list[LoraWeight]] = defaultdict(list)
    for name, weight in sorted(adapter.weights.items()):
        kinds[_kind(name), weight.rank, weight.alpha, weight.scale].append(weight)
    rows = []
    for (name, rank, alpha, scale), group in kinds.items():
        lengths = [_length(weight) for weight in group]
        rows.append([name, str(len(group)), str(rank), f"{alpha:g}", f"{scale:.4g}"])
        rows[-1] += [f"{np.mean(lengths):.4g}", f"{max(lengths):.4g}", str(sum(length == 0 for length in lengths))]
    display.table(
        "scale * B @ A", ["module", "count", "rank", "alpha", "scale", "mean length", "longest", "zero"], rows
    )
    if broken := [
        name for name, w in adapter.weights.items() if not all(np.isfinite(p).all() for p in w.parts().values())
    ]:
        display.warn(f"{len(broken)} modules hold values that are not finite, such as {broken[0]}")


def _kind(module: str) -> str:
    """The last part of a module's name, of an expert's the last but its number."""
    parts = stack_of(module).split(".")
    return parts[-1] if stack_of(module) == module else ".".join(parts[-2:])


def convert_adapter(path: Path, out: Path, to: str, model: str | None, context: Context) -> None:
    """Rewrite an adapter as `peft`, `mlx` or `gguf`. Raises UserError before anything is written."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already.", "Give a new name.")
    if to == "gguf" and model is None:
        raise UserError("A GGUF LoRA needs the base model's config.", "Add --model with the adapter's base model.")
    adapter, base = _read(path, model, context)
    if to == "gguf" and base is not None:
        check_lora_model(ModelFolder(base))
        write_gguf_lora(adapter, base, out, _llama(context))
    else:
        multimodal = base is not None and is_multimodal(ModelFolder(base).written_config)
        (write_peft if to == "peft" else write_mlx)(out, adapter, multimodal)
    context.display.say(f"{len(adapter.weights)} modules of {path} -> {out} ({to})")


def _read(path: Path, model: str | None, context: Context) -> tuple[Adapter, Path | None]:
    """The adapter, and its base model's folder with which it was compared where that is given."""
    if model is None:
        if path.suffix == ".gguf":
            raise UserError(f"{path}: the tensor names of a GGUF LoRA are read with its base model.", "Add --model.")
        return read_any(path), None
    base = resolve(model, context.display.say, tried=True)
    shapes = linear_shapes(base, ["all-linear"])
    if path.suffix == ".gguf":
        if holds_experts(path):
            shapes = linear_shapes(base, ["all-linear", EXPERTS])
        adapter = replace(
            read_gguf_lora(path, base.path, shapes, _llama(context)), layers=layer_count(shapes), base_model=model
        )
    else:
        adapter = read_any(path, layer_count(shapes))
        if has_experts(adapter.weights):
            shapes = linear_shapes(base, ["all-linear", EXPERTS])
    validate(adapter, shapes, path)
    return adapter, base.path


def _llama(context: Context) -> LlamaCpp:
    with context.display.stage("find or build llama.cpp") as progress:
        return ensure(context.llama_cpp, progress)


def _length(weight: LoraWeight) -> float:
    """Frobenius norm of scale * B @ A, without making the product."""
    inner = (weight.B.T.astype(np.float64) @ weight.B) * (weight.A.astype(np.float64) @ weight.A.T)
    return weight.scale * float(np.sqrt(max(inner.sum(), 0.0)))


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("inspect", "show method, layers, ranks, scales, and how far each kind of layer is moved"),
        ("convert", "rewrite an adapter for PEFT, mlx-lm or llama.cpp; scales, ranks and patterns keep their meaning"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        action.add_argument(
            "path", type=Path, metavar="PATH", help="adapter folder of PEFT or mlx-lm, run folder, or LoRA GGUF"
        )
        if name == "convert":
            action.add_argument("out", type=Path, metavar="OUT", help="folder to make, or file for a GGUF")
            action.add_argument("--to", choices=("peft", "mlx", "gguf"), required=True, help="layout to write")
        action.add_argument("--model", metavar="NAME", help="base model to check it against; needed for a GGUF")
        add_llama(action)


def run(args: argparse.Namespace, context: Context) -> None:
    check_llama(args.path.suffix == ".gguf" or getattr(args, "to", None) == "gguf", context)
    if args.action == "inspect":
        inspect_adapter(args.path, args.model, context)
    else:
        convert_adapter(args.path, args.out, args.to, args.model, context)

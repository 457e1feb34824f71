"""`adapter inspect` and `adapter convert`: anyone's adapter, looked at and rewritten."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.backend import Adapter, LoraWeight
from common.display import Display
from common.errors import UserError
from common.llama_cpp.install import LlamaCpp, ensure
from common.llama_cpp.lora import read_gguf_lora, write_gguf_lora
from common.models.adapter_files import read_any, write_mlx, write_peft
from common.models.lora_init import layer_count, layer_number, validate
from common.models.resolve import resolve
from common.models.shapes import linear_shapes


def inspect_adapter(path: Path, model: str | None, llama_cpp: str | None, display: Display) -> None:
    """Print what an adapter is: method, layers, ranks, scales, and how far it moves each kind of layer."""
    adapter = _read(path, model, llama_cpp, display)[0]
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
        kinds[name.rsplit(".", 1)[-1], weight.rank, weight.alpha, weight.scale].append(weight)
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


def convert_adapter(path: Path, out: Path, to: str, model: str | None, llama_cpp: str | None, display: Display) -> None:
    """Rewrite an adapter as `peft`, `mlx` or `gguf`. Raises UserError before anything is written."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there already.", "Give a new name.")
    if to == "gguf" and model is None:
        raise UserError("A GGUF LoRA needs the base model's config.", "Add --model with the adapter's base model.")
    adapter, base = _read(path, model, llama_cpp, display)
    if to == "gguf" and base is not None:
        write_gguf_lora(adapter, base, out, _llama(llama_cpp, display))
    else:
        (write_peft if to == "peft" else write_mlx)(out, adapter)
    display.say(f"{len(adapter.weights)} modules of {path} -> {out} ({to})")


def _read(path: Path, model: str | None, llama_cpp: str | None, display: Display) -> tuple[Adapter, Path | None]:
    """The adapter, and its base model's folder with which it was compared where that is given."""
    if model is None:
        if path.suffix == ".gguf":
            raise UserError(f"{path}: a GGUF's names mean something only beside its base model.", "Add --model.")
        return read_any(path), None
    base = resolve(model, display.say)
    shapes = linear_shapes(base, ["all-linear"])
    if path.suffix == ".gguf":
        adapter = replace(
            read_gguf_lora(path, base, shapes, _llama(llama_cpp, display)), layers=layer_count(shapes), base_model=model
        )
    else:
        adapter = read_any(path, layer_count(shapes))
    validate(adapter, shapes, path)
    return adapter, base


def _llama(llama_cpp: str | None, display: Display) -> LlamaCpp:
    with display.stage("find or build llama.cpp") as progress:
        return ensure(llama_cpp, progress)


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

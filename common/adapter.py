"""The adapter in its two layouts, PEFT's and mlx-lm's: drawn, written, read and checked with numpy."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.families import hf_name, mlx_name
from common.seam import Adapter, LoraWeight

_PEFT_PREFIX = "base_model.model."
PEFT_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


def initial_adapter(
    shapes: dict[str, tuple[int, int]], base_model: str, rank: int, alpha: float, dropout: float, seed: int
) -> Adapter:
    """The start both backends are handed: A uniform in +-1/sqrt(in) as in Hu et al. 2021 and PEFT, B zero.

    `shapes` gives (out, in) of each module to adapt.
    """
    random = np.random.default_rng([seed, 0])
    weights = {}
    for name in sorted(shapes):
        out_features, in_features = shapes[name]
        bound = 1 / math.sqrt(in_features)
        A = random.uniform(-bound, bound, (rank, in_features)).astype(np.float32)
        weights[name] = LoraWeight(A, np.zeros((out_features, rank), np.float32), alpha)
    return Adapter(base_model, rank, alpha, dropout, weights)


def validate(adapter: Adapter, shapes: dict[str, tuple[int, int]], where: Path) -> None:
    """Every matrix fits the base model. Raises UserError listing all that do not."""
    faults = []
    for name, weight in adapter.weights.items():
        if name not in shapes:
            faults.append(f"{name}: the base model has no such linear layer")
            continue
        out_features, in_features = shapes[name]
        wanted = {"lora_A": (adapter.rank, in_features), "lora_B": (out_features, adapter.rank)}
        for part, array in (("lora_A", weight.A), ("lora_B", weight.B)):
            if array.shape != wanted[part]:
                faults.append(f"{name}.{part}: shape {array.shape}, the base model wants {wanted[part]}")
            elif not np.isfinite(array).all():
                faults.append(f"{name}.{part}: holds values that are not finite")
    if not adapter.weights:
        faults.append("it holds no LoRA weights")
    if faults:
        raise UserError(f"The adapter in {where} does not fit its base model:\n" + "\n".join(faults), "Train it anew.")


def write_peft(folder: Path, adapter: Adapter) -> None:
    """PEFT's layout: A as (r, in), B as (out, r). `PeftModel.from_pretrained` loads the folder as it is."""
    tensors = {}
    for name, weight in adapter.weights.items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(weight.A)
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(weight.B)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": _targets(adapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    _write(folder, PEFT_FILE, tensors, config)


def _targets(adapter: Adapter) -> list[str]:
    """Last names, or whole ones where last names would find a vision tower's layers too."""
    multimodal = any(name.startswith("model.language_model.") for name in adapter.weights)
    return sorted({name if multimodal else name.rsplit(".", 1)[-1] for name in adapter.weights})


def write_mlx(folder: Path, adapter: Adapter) -> None:
    """mlx-lm's layout: both matrices transposed, `scale` for alpha / r. `mlx_lm.generate --adapter-path` loads it."""
    tensors = {}
    for name, weight in adapter.weights.items():
        tensors[f"{mlx_name(name)}.lora_a"] = np.ascontiguousarray(weight.A.T)
        tensors[f"{mlx_name(name)}.lora_b"] = np.ascontiguousarray(weight.B.T)
    layers = {name.split(".layers.")[1].split(".")[0] for name in adapter.weights}
    config = {
        "fine_tune_type": "lora",
        "num_layers": max(map(int, layers)) + 1,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.alpha / adapter.rank,
            "dropout": adapter.dropout,
            "keys": sorted({name.split(".layers.")[1].split(".", 1)[1] for name in adapter.weights}),
        },
        "model": adapter.base_model,
    }
    _write(folder, MLX_FILE, tensors, config)


def read_peft(folder: Path) -> Adapter:
    """Raises UserError naming the file that is missing or broken."""
    config, tensors = _read(folder, PEFT_FILE)
    weights = {}
    for key in sorted(tensors):
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight")
            B = tensors.get(f"{_PEFT_PREFIX}{name}.lora_B.weight")
            if B is None:
                raise UserError(f"{folder / PEFT_FILE}: {name} has lora_A without lora_B.", "Train the adapter anew.")
            weights[name] = LoraWeight(tensors[key], B, float(config["lora_alpha"]))
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return Adapter(config.get("base_model_name_or_path") or "", rank, alpha, config.get("lora_dropout", 0.0), weights)


def read_mlx(folder: Path) -> Adapter:
    """Raises UserError naming the file that is missing or broken."""
    config, tensors = _read(folder, MLX_FILE)
    shape = config["lora_parameters"]
    rank, alpha = int(shape["rank"]), float(shape["scale"]) * int(shape["rank"])
    weights = {}
    for key in sorted(tensors):
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            A, B = (np.ascontiguousarray(tensors[f"{name}.{part}"].T) for part in ("lora_a", "lora_b"))
            weights[hf_name(name)] = LoraWeight(A, B, alpha)
    return Adapter(config.get("model", ""), rank, alpha, shape.get("dropout", 0.0), weights)


def write_both(folder: Path, adapter: Adapter) -> None:
    """`adapter/` and `adapter-mlx/` in `folder`, read back and compared with what was meant before this returns."""
    shapes = {name: (weight.B.shape[0], weight.A.shape[1]) for name, weight in adapter.weights.items()}
    for name, write, read in (("adapter", write_peft, read_peft), ("adapter-mlx", write_mlx, read_mlx)):
        write(folder / name, adapter)
        again = read(folder / name)
        validate(again, shapes, folder / name)
        for module, weight in adapter.weights.items():
            found = again.weights.get(module)
            same = found and np.array_equal(weight.A, found.A) and np.array_equal(weight.B, found.B)
            if not same or not math.isclose(again.alpha, adapter.alpha):
                raise UserError(
                    f"{folder / name}: what was read back is not what was written ({module}).", "Check the disk."
                )


def _write(folder: Path, name: str, tensors: dict[str, np.ndarray], config: dict) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / name, metadata={"format": "pt"})
    (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _read(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / name)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: there is no whole adapter here: {error.filename}.", "Give a run folder.") from None
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter is damaged: {error}", "Take it from a checkpoint.") from None
    return config, {key: tensor.astype(np.float32) for key, tensor in tensors.items()}

"""An adapter's files in two layouts, PEFT's and mlx-lm's: written and read with numpy."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.backend import Adapter, LoraWeight
from common.documents import read_json
from common.errors import UserError
from common.files import atomic_folder
from common.model_files import copy_template
from common.models import granite4
from common.models.adapter_compare import is_same
from common.models.adapter_names import as_in_base, as_in_libraries
from common.models.adapter_settings import by_pattern, check_peft_settings, dropout_of, number, refused
from common.models.experts import by_stack, expert_names, has_experts, mlx_stack, stack_in_mlx, stacked_in_mlx
from common.models.families import hf_name
from common.models.lora_init import layer_number, validate
from common.models.safetensors_files import lazy_tensors, load_tensors, read_header, save_tensors

_PEFT_PREFIX = "base_model.model."
PEFT_FILE = "adapter_model.safetensors"
MLX_FILE = "adapters.safetensors"
FULL_FILE = "model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_MLX_NAMES = {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}
_REMEDY = "Take it from a checkpoint."
_DIVIDED = "divided"  # in mlx-lm's layout: whether gate_proj and up_proj are rows of one matrix, as in a Granite 4
_IN_LAYERS = re.compile(r"\.layers\.\d+\.")


def write_peft(folder: Path, adapter: Adapter, multimodal: bool = False) -> None:
    """Write PEFT's layout: A as [r, in], B as [out, r]. `PeftModel.from_pretrained` loads the folder as it is.

    multimodal: whether the base is. Its modules then have the names that libraries know, whatever its files call them.
    """
    adapter, metadata = as_in_libraries(adapter, multimodal)
    tensors = {
        f"{_PEFT_PREFIX}{name}.{_PEFT_NAMES[part]}": np.ascontiguousarray(array)
        for name, weight in adapter.weights.items()
        for part, array in weight.parts().items()
    }
    rank, alpha = adapter.rank_and_alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: w.rank for name, w in adapter.weights.items() if w.rank != rank},
        "alpha_pattern": {name: w.alpha for name, w in adapter.weights.items() if w.alpha != alpha},
        "lora_dropout": adapter.dropout,
        "target_modules": _targets(adapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": next(iter(adapter.weights.values())).rslora,
        "use_dora": adapter.dora,
    }
    _write(folder, PEFT_FILE, tensors, config, metadata)


def _targets(adapter: Adapter) -> list[str]:
    """PEFT's `target_modules`: short names where they match the adapted modules only, else full names.

    Short names would match a vision tower's modules too, and layers that --layers left out.
    """
    names = {name.rsplit(".", 1)[-1] for name in adapter.weights}
    everywhere = len(by_stack(adapter.weights)) == len(names) * adapter.layers
    if everywhere and all(name.startswith("model.layers.") for name in adapter.weights):
        return sorted(names)
    return sorted(adapter.weights)


def write_mlx(folder: Path, adapter: Adapter, multimodal: bool = False) -> None:
    """Write mlx-lm's layout: matrices transposed, one rank and one scale. `mlx_lm.generate --adapter-path` loads it.

    Smaller ranks are padded with zeros and other scales multiplied into B, so that every product stays the same.
    multimodal: as in write_peft.
    """
    adapter, metadata = as_in_libraries(adapter, multimodal)
    rank = max(weight.rank for weight in adapter.weights.values())
    scales = Counter(weight.scale for weight in adapter.weights.values() if weight.scale)  # an alpha may be 0
    scale = scales.most_common(1)[0][0] if scales else 0.0
    tensors, weights = {}, granite4.as_in_mlx(adapter.weights)
    for name, weight in weights.items():
        B = weight.B if weight.scale == scale else times(weight.B, weight.scale / scale, name)
        missing = rank - weight.rank
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(np.pad(weight.A.T, ((0, 0), (0, missing))))
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(np.pad(B.T, ((0, missing), (0, 0))))
        if weight.magnitude is not None:
            tensors[f"{name}.m"] = np.ascontiguousarray(weight.magnitude)
    tensors = stacked_in_mlx(tensors, by_stack(weights))
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        # mlx-lm counts from the last layer; -1 (all) where the base's number of layers is not known
        "num_layers": adapter.layers - min(map(layer_number, adapter.weights)) if adapter.layers else -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout,
            "keys": sorted({mlx_stack(s).split(".layers.")[1].split(".", 1)[1] for s in by_stack(weights)}),
        },
        "model": adapter.base_model,
        **({} if weights.keys() == adapter.weights.keys() else {_DIVIDED: True}),
    }
    _write(folder, MLX_FILE, tensors, config, metadata)


def times(B: np.ndarray, factor: float, name: str) -> np.ndarray:
    """A module's B times what its scale has beyond the file's. Raises UserError where float32 cannot hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = B * np.float32(factor)
    if not np.isfinite(product).all():
        raise UserError(
            f"{name}: its scale is {factor:.3g} times another module's, and lora_B times that is not finite.",
            "Keep the adapter in PEFT's layout, or fuse it (fuse).",
        )
    return product


def read_peft(folder: Path, layers: int = 0) -> Adapter:
    """The adapter in PEFT's layout, with rsLoRA, DoRA, rank and alpha patterns.

    layers: the base model's number, 0 where it is not known. Raises UserError naming the file that is missing or
    damaged, or the setting that Twintune does not compute.
    """
    config, tensors = _read(folder, PEFT_FILE)
    where = folder / CONFIG_FILE
    check_peft_settings(where, config)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):
        name = hf_name(key.removeprefix(_PEFT_PREFIX))
        part = next((p for p, ending in _PEFT_NAMES.items() if name.endswith(f".{ending}")), None)
        if part is None or not _IN_LAYERS.search(name):
            raise refused(folder / PEFT_FILE, f"{key} is not a LoRA matrix of a linear layer in the model's layers")
        found.setdefault(name.removesuffix(f".{_PEFT_NAMES[part]}"), {})[part] = tensor
    ranks = by_pattern(where, "rank_pattern", config, found, config.get("r", 8))
    alphas = by_pattern(where, "alpha_pattern", config, found, config.get("lora_alpha", 8))
    weights = {}
    for name, parts in found.items():
        A, B, magnitude = _complete(folder / PEFT_FILE, name, parts, bool(config.get("use_dora")))
        if ranks[name] != A.shape[0]:
            raise refused(where, f"it says rank {ranks[name]} for {name}, whose lora_A has {A.shape[0]} rows")
        alpha = number(where, "alpha", alphas[name])
        weights[name] = LoraWeight(A, B, alpha, bool(config.get("use_rslora")), magnitude)
    weights = as_in_base(folder / PEFT_FILE, weights)
    return _adapter(where, config.get("base_model_name_or_path"), layers, config.get("lora_dropout", 0.0), weights)


def read_mlx(folder: Path, layers: int = 0) -> Adapter:
    """The adapter in mlx-lm's layout, LoRA or DoRA. Raises UserError as read_peft does."""
    config, tensors = _read(folder, MLX_FILE)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise refused(folder / CONFIG_FILE, f"its fine_tune_type is {kind}")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or "scale" not in settings:
        raise refused(folder / CONFIG_FILE, "lora_parameters.scale is missing, and it cannot be guessed")
    scale = number(folder / CONFIG_FILE, "scale", settings["scale"])
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):
        name, _, ending = key.rpartition(".")
        part = next((p for p, theirs in _MLX_NAMES.items() if theirs == ending), None)
        if part is None or not _IN_LAYERS.search(name):
            raise refused(folder / MLX_FILE, f"{key} is not a LoRA matrix of a linear layer in the model's layers")
        stack = stack_in_mlx(name)
        if (stack or part != "magnitude") and (tensor.ndim != (3 if stack else 2) or not tensor.size):
            raise refused(folder / MLX_FILE, f"{key} has the shape {tensor.shape}")
        members = expert_names(hf_name(stack), len(tensor)) if stack else [hf_name(name)]
        for member, matrix in zip(members, tensor if stack else [tensor.T], strict=True):
            found.setdefault(member, {})[part] = np.ascontiguousarray(matrix)
    weights = {}
    for name, parts in found.items():
        A, B, magnitude = _complete(folder / MLX_FILE, name, parts, kind == "dora")
        weights[name] = LoraWeight(A, B, scale * A.shape[0], False, magnitude)
    weights = as_in_base(folder / MLX_FILE, weights)
    whole = granite4.from_mlx(weights) if config.get(_DIVIDED) else weights
    if whole is None:
        raise refused(folder / MLX_FILE, "gate_proj and up_proj are not parts of one adapted matrix")
    return _adapter(folder / MLX_FILE, config.get("model"), layers, settings.get("dropout", 0.0), whole)


def _complete(
    where: Path, name: str, parts: dict[str, np.ndarray], dora: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A, B and magnitude of a module. Raises UserError where one is missing or their shapes contradict."""
    wanted = ["lora_A", "lora_B", *(["magnitude"] if dora else [])]
    if absent := [part for part in wanted if part not in parts]:
        raise UserError(f"{where}: {name} has no {absent[0]}.", "Fetch or train the adapter again.")
    if parts["lora_A"].ndim != 2 or parts["lora_B"].ndim != 2 or not parts["lora_A"].shape[0]:
        shapes = " and ".join(str(parts[part].shape) for part in ("lora_A", "lora_B"))
        raise refused(where, f"{name} does not hold matrices of a linear layer: {shapes}")
    if parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
        raise UserError(
            f"{where}: {name} has a lora_A of rank {parts['lora_A'].shape[0]} and a lora_B of rank "
            f"{parts['lora_B'].shape[1]}.",
            "Fetch or train the adapter again.",
        )
    return parts["lora_A"], parts["lora_B"], parts.get("magnitude")


def _adapter(where: Path, base: object, layers: int, dropout: object, weights: dict[str, LoraWeight]) -> Adapter:
    if not weights:
        raise refused(where, "it holds no LoRA weights")
    dora = any(weight.magnitude is not None for weight in weights.values())
    name = str(base or "").encode("utf-8", "replace").decode()  # JSON can hold half a letter, and no file can
    return Adapter(name, layers, dropout_of(where, dropout), weights, dora=dora)


def read_any(folder: Path, layers: int = 0) -> Adapter:
    """The adapter in PEFT's or mlx-lm's layout, whichever file is there; a run folder stands for its `adapter/`."""
    file = _file_of(folder)
    return (read_peft if file.name == PEFT_FILE else read_mlx)(file.parent, layers)


def names_experts(folder: Path) -> bool:
    """Whether `read_any` would give an adapter of experts: no weight is read."""
    modules = [name.rpartition(".lora_")[0] for name in read_header(_file_of(folder))[0]]
    return has_experts(modules) or any(map(stack_in_mlx, modules))


def _file_of(folder: Path) -> Path:
    for inside in (folder / "adapter", folder):
        for name in (PEFT_FILE, MLX_FILE):
            if (inside / name).is_file():
                return inside / name
    raise UserError(
        f"{folder} holds no adapter: neither {PEFT_FILE} nor {MLX_FILE}.",
        "Give an adapter folder of PEFT or mlx-lm, or a run folder. Pickled adapters (.bin) are not read.",
    )


def write_both(folder: Path, adapter: Adapter, multimodal: bool = False) -> Adapter:
    """Write `adapter/` and `adapter-mlx/` into `folder`, read both back and compare them with `adapter`.

    Beside each stands the run's chat template, where it has one: the base's may give other prompts than training had.
    Where every weight was trained there is no adapter: `full/` holds all tensors in float32. Returns the adapter to
    continue with: these tensors are read from there, so that nobody keeps a copy of the model. Raises UserError where
    what was read differs. multimodal: as in write_peft.
    """
    if adapter.full:
        write_trained(folder, adapter)
        return read_trained(folder, adapter.layers)
    write_peft(folder / "adapter", adapter, multimodal)
    write_mlx(folder / "adapter-mlx", adapter, multimodal)
    shapes = {name: (weight.B.shape[0], weight.A.shape[1]) for name, weight in adapter.weights.items()}
    for name, read in (("adapter", read_peft), ("adapter-mlx", read_mlx)):
        written = read(folder / name, adapter.layers)
        validate(written, shapes, folder / name)
        for module, weight in adapter.weights.items():
            found = written.weights.get(module)
            if found is None or not is_same(weight, found):
                raise UserError(
                    f"{folder / name}: what was read back is not what was written ({module}).", "Check the disk."
                )
        copy_template(folder, folder / name)
    return adapter


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over every matrix, its scale and its module's name, the same for both layouts."""
    digest = hashlib.sha256()
    for name, weight in sorted(adapter.weights.items()):
        for part, array in weight.parts().items():
            digest.update(json.dumps([name, part, weight.scale, array.shape]).encode())
            digest.update(np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()


def write_trained(folder: Path, adapter: Adapter) -> None:
    """Write `adapter/` in PEFT's layout, or `full/` where every weight was trained."""
    if adapter.full:
        _write(folder / "full", FULL_FILE, adapter.full, {"base_model": adapter.base_model}, {})
    else:
        write_peft(folder / "adapter", adapter)


def read_trained(folder: Path, layers: int = 0) -> Adapter:
    """The adapter that write_trained wrote; of every weight, tensor by tensor while its files stay as they are."""
    if (folder / "full").is_dir():
        config = _config(folder / "full", FULL_FILE)
        tensors = lazy_tensors(folder / "full" / FULL_FILE, _REMEDY)
        return Adapter(str(config.get("base_model", "")), layers, 0.0, {}, tensors)
    return read_peft(folder / "adapter", layers)


def _write(folder: Path, name: str, tensors: Mapping[str, np.ndarray], config: dict, more: dict[str, str]) -> None:
    with atomic_folder(folder) as temporary:
        save_tensors(tensors, temporary / name, {"format": "pt", **more})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(folder: Path, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    config, tensors = _config(folder, name), load_tensors(folder / name, _REMEDY)
    return config, {key: tensor.astype(np.float32, copy=False) for key, tensor in tensors.items()}


def _config(folder: Path, name: str) -> dict:
    """Of an adapter's folder. Raises UserError where that lacks it, or the file of this name."""
    for file in (CONFIG_FILE, name):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: there is no complete adapter here: it has no {file}.", "Give a run folder.")
    return read_json(folder / CONFIG_FILE, _REMEDY)

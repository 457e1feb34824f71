"""A model's first layers as a model of their own: what is checked of a large model fits a small machine."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.lazy_arrays import LazyArrays
from common.model_files import COPIED, copy_file
from common.models.families import LANGUAGE_LAYER, OTHER_PARTS
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import DTYPES, StoredTensor, save_tensors

_PERIODS = (  # keys for every how many layers one is of another kind
    *("sliding_window_pattern", "no_rope_layer_interval", "full_attention_interval"),
    *("global_attn_every_n_layers", "attn_layer_period", "expert_layer_period"),
)
_SHORTER = {  # in tokens
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 24),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
}


def layer_kinds(model: ModelFolder) -> list[str]:
    """Of each layer what it is: its tensors and their shapes, and what the config's lists say of it."""
    count = int(model.config["num_hidden_layers"])
    parts: list[list[str]] = [[] for _ in range(count)]
    for name, tensor in sorted(model.tensors.items()):
        if (found := LANGUAGE_LAYER.fullmatch(name)) and int(found[1]) < count:
            parts[int(found[1])].append(f"{found[2]} {tensor.shape}")
    for key, value in sorted(model.config.items()):
        if isinstance(value, list | str) and _of_each_layer(key, value, count):
            for number, entry in enumerate(value):
                parts[number].append(f"{key} {entry}")
    return [json.dumps(part) for part in parts]


def enough_layers(model: ModelFolder) -> int:
    """So many of the first layers hold one of each kind; at least two. All, where the last take from others."""
    kinds, config = layer_kinds(model), model.config
    if config.get("num_kv_shared_layers"):
        return len(kinds)
    periods = [config.get(key) or 0 for key in _PERIODS]
    periods = [len(period) if isinstance(period, str) else int(period) for period in periods]
    return min(len(kinds), max(2, *periods, 1 + max(kinds.index(kind) for kind in {*kinds})))


def write_first_layers(model: ModelFolder, count: int, out: Path) -> ModelFolder:
    """The model with its first `count` layers, embeddings and head, in float32 in `out`. Raises UserError."""
    out.mkdir(parents=True, exist_ok=True)
    total = int(model.config["num_hidden_layers"])
    kept = {name: tensor for name, tensor in model.tensors.items() if _is_kept(name, count)}
    if not kept:
        raise UserError(f"{model.path} has no weights with names that are known.", "Fetch the model again.")
    _write(kept, out / "model.safetensors")
    config = _cut(model.written_config, total, count)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in COPIED:
        if (model.path / name).is_file():
            copy_file(model.path / name, out / name)
    return ModelFolder(out)


def _is_kept(name: str, count: int) -> bool:
    """Not a layer beyond, none of what predicts several tokens at once, and of no tower for images or sound."""
    found = LANGUAGE_LAYER.fullmatch(name)
    return not OTHER_PARTS.match(name) and (found is None or int(found[1]) < count)


def _of_each_layer(key: str, value: list[Any] | str, total: int) -> bool:
    """Whether a config's value has an entry for each layer, or a letter."""
    return len(value) == total and (isinstance(value, list) or key.endswith("pattern"))


def _cut(config: dict[str, Any], total: int, count: int) -> dict[str, Any]:
    cut = {
        key: value[:count] if isinstance(value, list | str) and _of_each_layer(key, value, total) else value
        for key, value in config.items()
    }
    if isinstance(config.get("text_config"), dict):
        cut["text_config"] = _cut(config["text_config"], total, count)
    if "num_hidden_layers" in cut:
        cut["num_hidden_layers"] = count
    return _reached({key: "float32" if key in ("dtype", "torch_dtype") else value for key, value in cut.items()})


def _reached(config: dict[str, Any]) -> dict[str, Any]:
    """The config with windows, chunks and original contexts so short that rows of a check are longer."""
    longer = [key for key, value in _SHORTER.items() if isinstance(config.get(key), int) and config[key] > value]
    shorter: dict[str, Any] = {key: _SHORTER[key] for key in longer}
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, dict) and isinstance(rope.get("original_max_position_embeddings"), int):
            shorter[name] = rope | {"original_max_position_embeddings": 32}
    return config | shorter


def _write(tensors: dict[str, StoredTensor], path: Path) -> None:
    """In float32: in 16 bits a fused adapter would be rounded away."""

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        stored = np.fromfile(tensor.file, DTYPES[tensor.dtype], math.prod(tensor.shape), offset=tensor.start)
        return stored.reshape(tensor.shape).astype(np.float32)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    save_tensors(LazyArrays(shapes, read), path, {"format": "pt"})

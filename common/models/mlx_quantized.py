"""Ready-made MLX weights in 4 or 8 bits, and their 16-bit view, which everything but MLX's training reads."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.documents import read_json
from common.errors import UserError
from common.files import atomic_folder, atomic_write
from common.model_files import copy_file, known_files
from common.models.families import language_tensor, text_name
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import load_tensors, save_tensors
from common.system.cache import artifact_lock, cache_folder
from common.system.disk import require_disk

_MODES = ("affine",)
_BITS = (4, 8)


_REMEDY = "Fetch the model's files again."
_CONVOLUTIONS = ("linear_attn.conv1d.weight", "conv.conv.weight")  # Qwen3.5's, LFM2's
_CENTERED = ("layernorm.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "model.norm.weight")
_SOURCE = "quantized_source.json"  # in a view: the folder with the quantized weights


def is_quantized(model: ModelFolder) -> bool:
    """Whether MLX quantized the model's weights."""
    try:
        settings = model.written_config.get("quantization")
    except UserError:
        return False
    return isinstance(settings, dict) and "bits" in settings and "group_size" in settings


def is_mlx_layout(model: ModelFolder) -> bool:
    """Whether a Qwen3.5 or an LFM2 is as mlx-lm saves it: its convolutions have their axes turned."""
    shapes = (tensor.shape for name, tensor in model.tensors.items() if name.endswith(_CONVOLUTIONS))
    return any(len(shape) == 3 and shape[2] == 1 < shape[1] for shape in shapes)


def usual_layout(tensors: dict[str, Any], kind: str) -> dict[str, Any]:
    """Such tensors, of numpy or MLX, as transformers stores them.

    kind: the model type. The norms of a Qwen3.5 are one larger.
    """
    turned = {name: tensor.swapaxes(1, 2) for name, tensor in tensors.items() if name.endswith(_CONVOLUTIONS)}
    norms = _CENTERED if kind.startswith("qwen3_5") else ()
    return tensors | turned | {name: tensor - 1 for name, tensor in tensors.items() if name.endswith(norms)}


def _views() -> Path:
    return cache_folder() / "models"


def view(model: ModelFolder, name: str, say: Callable[[str], None]) -> Path:
    """The model's 16-bit view, made once and cached by its contents. Raises UserError for unsupported schemes."""
    try:
        known = scheme(model.written_config)
    except UserError as error:
        raise UserError(f"--model {name}: {error.what[0].lower()}{error.what[1:]}", error.fix) from None
    folder, digest = model.path, hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    out = _views() / f"{folder.resolve().name}-16bit-{digest.hexdigest()[:12]}"
    source = json.dumps({"path": str(folder.resolve()), "scheme": known}).encode()
    if (out / _SOURCE).is_file() and (out / _SOURCE).read_bytes() == source:  # then the cache need not be writable
        return out
    with artifact_lock(out, say):
        if not out.is_dir():
            write_16bit(model, out, say)
        with atomic_write(out / _SOURCE) as temporary:
            temporary.write_bytes(source)
    return out


def quantized_source(folder: Path) -> tuple[Path, str] | None:
    """For a view, the folder with the quantized weights, and their scheme; None for any other folder.

    A view lies in the cache. The same file in a stranger's folder could name any path.
    """
    if folder.resolve().parent != _views().resolve() or not (folder / _SOURCE).is_file():
        return None
    known = read_json(folder / _SOURCE, f"Remove {folder}: it is made again.")
    return Path(known["path"]), known["scheme"]


def scheme(config: dict[str, Any]) -> str | None:
    """Such as `mlx-4bit-64`, from a config's `quantization`; None without. Raises UserError for unsupported schemes."""
    settings = config.get("quantization")
    if settings is None:
        return None
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    for part in parts:
        bits, mode = part.get("bits", settings.get("bits")), part.get("mode", settings.get("mode", "affine"))
        if type(bits) is not int or bits not in _BITS or mode not in _MODES:
            raise UserError(
                f"Its weights are quantized by MLX to {bits} bits ({mode}); 4 and 8 bits (affine) are read.",
                "Give the 4-bit, 8-bit or 16-bit version of the model.",
            )
    if type(settings["group_size"]) is not int:
        raise UserError(f"Its weights are in groups of {settings['group_size']!r}.", _REMEDY)
    mixed = "-mixed" if len(parts) > 1 else ""
    return f"mlx-{settings['bits']}bit-{settings['group_size']}{mixed}"


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [out, n] -> uint8 [out, n * 32 / bits]; the first value is in the lowest bits (mlx.core.quantize)."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((packed[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8).reshape(len(packed), -1)


def write_16bit(model: ModelFolder, out: Path, say: Callable[[str], None]) -> None:
    """Write `out`, the model with its weights dequantized to bf16 under the same names: complete, or not at all."""
    settings = model.written_config["quantization"]
    config = {k: v for k, v in model.written_config.items() if k not in ("quantization", "quantization_config")}
    say(f"{model.path.name}: making the 16-bit view of its {scheme(model.written_config)} weights, once ...")
    require_disk([(out, "the 16-bit view", model.weight_bytes * 16 // settings["bits"])], "Free some space.")
    turned = is_mlx_layout(model)
    with atomic_folder(out) as temporary:
        index: dict[str, str] = {}
        for shard in model.shards:
            tensors = _shard(load_tensors(shard, _REMEDY), settings, shard)
            if turned:  # nobody knows how its vision tower is laid out
                tensors = {
                    name: t
                    for name, t in usual_layout(tensors, model.model_type).items()
                    if language_tensor(text_name(name), False)
                }
            save_tensors(tensors, temporary / shard.name, {"format": "pt"})
            index |= dict.fromkeys(tensors, shard.name)
        if len(set(index.values())) > 1:
            content = {"metadata": {}, "weight_map": dict(sorted(index.items()))}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        for file in known_files(model.path):
            if not file.name.endswith(".index.json"):
                copy_file(file, temporary / file.name)
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _fit(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, values: int) -> bool:
    """Whether each row of `packed`, with so many values in a number, falls into as many groups as it has scales."""
    if packed.dtype != np.uint32 or not packed.ndim == scales.ndim == 2 or scales.shape != biases.shape:
        return False
    return bool(scales.size) and len(scales) == len(packed) and packed.shape[1] * values % scales.shape[1] == 0


def _shard(tensors: dict[str, np.ndarray], settings: dict[str, Any], shard: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in tensors.items():
        module = name.rsplit(".", 1)[0]
        if f"{module}.scales" not in tensors or name.endswith(".bias"):
            found[name] = tensor
        elif name.endswith(".weight"):
            own = settings.get(module)
            bits = (own if isinstance(own, dict) else settings).get("bits", settings["bits"])
            scales, biases = (tensors.get(f"{module}.{part}", np.zeros(0)) for part in ("scales", "biases"))
            if not _fit(tensor, scales, biases, 32 // bits):
                raise UserError(f"{shard}: the scales of {name} do not fit it.", _REMEDY)
            scales, biases = scales.astype(np.float32), biases.astype(np.float32)
            values = unpack(tensor, bits).astype(np.float32).reshape(*scales.shape, -1)
            found[name] = (values * scales[..., None] + biases[..., None]).reshape(len(tensor), -1)
            found[name] = found[name].astype(ml_dtypes.bfloat16)
    return found

"""Names of an adapter's modules where a multimodal model's files call them otherwise than the libraries do.

The files of Qwen2-VL and Qwen2.5-VL have `model.layers`, as a text model's. PEFT and mlx-lm look for an adapter's
modules by the name within the complete model: `model.language_model.layers`.
"""

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from common.backend import Adapter, LoraWeight

_FLAT, _NESTED = "model.layers.", "model.language_model.layers."
_MARK = {"names": "nested"}  # in a file's metadata


def as_in_libraries(adapter: Adapter, multimodal: bool) -> tuple[Adapter, dict[str, str]]:
    """The adapter as PEFT and mlx-lm name its modules, and what its file's metadata says of that, if they are others.

    multimodal: whether the base is.
    """
    if not multimodal or not all(name.startswith(_FLAT) for name in adapter.weights):
        return adapter, {}
    weights = {name.replace(_FLAT, _NESTED, 1): weight for name, weight in adapter.weights.items()}
    return replace(adapter, weights=weights), _MARK


def as_in_base(file: Path, weights: dict[str, LoraWeight]) -> dict[str, LoraWeight]:
    """The weights of an adapter's file under the names that the base's files have."""
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    if _MARK.items() <= metadata.items():
        return {name.replace(_NESTED, _FLAT, 1): weight for name, weight in weights.items()}
    return weights

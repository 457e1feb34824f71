"""Names and layouts: HF's `lora_A` (r, in) and `lora_B` (out, r) are mlx-lm's `lora_a` and `lora_b`, transposed."""

import mlx.core as mx
import numpy as np

PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T if name.endswith(("lora_A", "lora_B")) else array)


def to_mlx(name: str, array: np.ndarray) -> mx.array:
    """`name` is the canonical one, as in optimizer state: it tells whether the layout is turned."""
    return mx.array(_turned(name, array))


def to_numpy(name: str, array: mx.array) -> np.ndarray:
    return _turned(name, np.array(array.astype(mx.float32)))

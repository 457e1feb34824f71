"""Names and layouts: HF's `lora_A` (r, in) and `lora_B` (out, r) are mlx-lm's `lora_a` and `lora_b`, transposed."""

import mlx.core as mx
import numpy as np

PARTS = {"lora_A": "lora_a", "lora_B": "lora_b"}


def to_mlx(array: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(array.T))


def to_numpy(array: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(array.astype(mx.float32)).T)

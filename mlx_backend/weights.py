"""Names and layouts: Hugging Face's `lora_A` [r, in], `lora_B` [out, r] are mlx-lm's `lora_a`, `lora_b`, transposed."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}
_TRANSPOSED = ("lora_A", "lora_B")


def _transposed(name: str, array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.T if name.endswith(_TRANSPOSED) else array)


def to_mlx(name: str, array: np.ndarray) -> mx.array:
    """In MLX's layout. name: the canonical one, as in optimizer state, which says whether it is transposed."""
    return mx.array(_transposed(name, array))


def stacked(arrays: Sequence[mx.array]) -> mx.array:
    """Of matrices in MLX's layout, one of each expert, mlx-lm's stack: A [experts, r, in], B [experts, out, r]."""
    return mx.stack([array.T for array in arrays])


def numpy_shape(name: str, array: mx.array) -> tuple[int, ...]:
    """Of what `to_numpy` gives."""
    return array.shape[::-1] if name.endswith(_TRANSPOSED) else array.shape


def to_numpy(name: str, array: mx.array) -> np.ndarray:
    return _transposed(name, np.array(array.astype(mx.float32)))

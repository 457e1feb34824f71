"""Safetensors files, read without a framework and without mapping them into memory."""

import json
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from common.errors import UserError

# safetensors' names for the types that weights come in; the rest is copied as bytes.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_COPY_BYTES = 1 << 24


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """A safetensors file's header (without its metadata) and where the data starts, in bytes.

    Format: 8 bytes little-endian header length, JSON, then the data (huggingface/safetensors).
    """
    whole = path.stat().st_size
    broken = UserError(f"{path} is no whole safetensors file.", "Fetch it again.")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if 8 + size > whole:
            raise broken
        try:
            header = json.loads(file.read(size))
        except ValueError:
            raise broken from None
    header.pop("__metadata__", None)
    if 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0) != whole:
        raise broken
    return header, 8 + size


def copy_bytes(source: BinaryIO, file: BinaryIO, size: int) -> None:
    """`size` bytes from where `source` stands, a few at a time."""
    for left in range(size, 0, -_COPY_BYTES):
        file.write(source.read(min(left, _COPY_BYTES)))

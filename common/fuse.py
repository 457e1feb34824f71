"""W + scale * B @ A, shard by shard, with numpy: the same bytes whichever backend asks, on any machine."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from common.errors import UserError
from common.families import hf_name
from common.seam import Adapter, LoraWeight, Progress

# safetensors' names for the types that weights come in; the rest is copied as bytes.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCK_ELEMENTS = 1 << 22  # at most this many weights in float32 at once: 16 MB an array


def shard_files(folder: Path) -> list[Path]:
    """The model's safetensors files, in name order."""
    return sorted(folder.glob("model*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """A safetensors file's header (without its metadata) and where the data starts, in bytes.

    Format: 8 bytes little-endian header length, JSON, then the data (huggingface/safetensors).
    """
    whole = path.stat().st_size
    broken = UserError(f"{path} is no whole safetensors file.", "Fetch it anew.")
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


def fuse_block(block: np.ndarray, weight: LoraWeight, rows: slice) -> np.ndarray:
    """Rows of a base matrix with the adapter added in float32, rounded once, to the base's own type.

    Rank-1 terms are summed in a fixed order: a matrix product's rounding depends on the BLAS at hand.
    """
    delta = np.zeros(block.shape, np.float32)
    for k in range(weight.rank):
        delta += weight.B[rows, k : k + 1] * weight.A[k : k + 1]
    return (block.astype(np.float32) + np.float32(weight.scale) * delta).astype(block.dtype)


def fuse(base: Path, adapter: Adapter, out: Path, progress: Progress) -> None:
    """Write `base`'s shards into `out` with the adapter added; memory stays near one block, not one shard.

    Raises UserError when an adapted module is not among the base's weights.
    """
    shards = shard_files(base)
    missing = set(adapter.weights)
    total = sum(shard.stat().st_size for shard in shards)
    done = 0
    for shard in shards:
        header, start = read_header(shard)
        target = out / shard.name
        with shard.open("rb") as source, target.open("wb") as file:
            file.write(source.read(start))  # names, types and shapes stay, so the header does
        data = np.memmap(shard, np.uint8, "r")
        with target.open("ab") as file:
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
                begin, end = (start + offset for offset in entry["data_offsets"])
                module = hf_name(name).removesuffix(".weight")
                weight = adapter.weights.get(module)
                missing.discard(module)
                if weight is None:
                    file.write(data[begin:end].data)
                else:
                    for piece in _fused_pieces(data[begin:end], entry, weight):
                        file.write(piece.tobytes())
                done += end - begin
                progress(done / total, f"fuse {name}")
        del data
    if missing:
        raise UserError(
            f"{base} has no weights for {len(missing)} adapted modules, such as {min(missing)}.",
            "Give the base model that the adapter was trained on.",
        )


def _fused_pieces(raw: np.ndarray, entry: dict, weight: LoraWeight) -> Iterator[np.ndarray]:
    matrix = raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    height = max(1, _BLOCK_ELEMENTS // math.prod(matrix.shape[1:]))
    for top in range(0, matrix.shape[0], height):
        rows = slice(top, top + height)
        yield fuse_block(matrix[rows], weight, rows)

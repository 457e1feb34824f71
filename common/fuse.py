"""W + scale * B @ A, shard by shard, with numpy: the same bytes whichever backend asks, on any machine."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

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
    """Rows of a base matrix with the adapter added, in float32.

    Rank-1 terms are summed in a fixed order: a matrix product's rounding depends on the BLAS at hand.
    """
    delta = np.zeros(block.shape, np.float32)
    for k in range(weight.rank):
        delta += weight.B[rows, k : k + 1] * weight.A[k : k + 1]
    fused = block.astype(np.float32) + np.float32(weight.scale) * delta
    if weight.magnitude is not None:
        fused *= (weight.magnitude[rows] / row_lengths(fused))[:, None]
    return fused


def row_lengths(matrix: np.ndarray) -> np.ndarray:
    """Euclidean lengths of a float32 matrix's rows; summed in float64 one column after the other, in a fixed order."""
    total = np.zeros(matrix.shape[0], np.float64)
    for column in matrix.T:
        total += column.astype(np.float64) ** 2
    return np.sqrt(total).astype(np.float32)


def fuse(
    base: Path,
    adapter: Adapter,
    out: Path,
    progress: Progress,
    replaced: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> None:
    """Write `base`'s shards into `out` with the adapter added; memory stays near one block, not one shard.

    `replaced` makes the tensors that stand in for the base's own, by name, such as the dequantised weights it was
    trained over. Raises UserError when an adapted module is not among the base's weights.
    """
    shards = shard_files(base)
    replaced = {**replaced} | {name: partial(np.asarray, tensor) for name, tensor in adapter.full.items()}
    missing = {f"{name}.weight" for name in adapter.weights} | set(replaced)
    embedding = next((name for name in adapter.full if name.endswith("embed_tokens.weight")), None)
    if embedding and "lm_head.weight" not in adapter.full:  # tied, and some checkpoints store it twice all the same
        replaced["lm_head.weight"] = replaced[embedding]
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
                name = hf_name(name)
                weight = adapter.weights.get(name.removesuffix(".weight"))
                missing.discard(name)
                if weight is None and name not in replaced:
                    file.write(data[begin:end].data)
                else:
                    stored = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
                    for piece in _fused_pieces(replaced[name]() if name in replaced else stored, weight):
                        file.write(piece.astype(stored.dtype).tobytes())
                done += end - begin
                progress(done / total, f"fuse {name}")
        del data
    if missing:
        raise UserError(
            f"{base} has no weights for {len(missing)} trained modules, such as {min(missing)}.",
            "Give the base model that the adapter was trained on.",
        )


def _fused_pieces(matrix: np.ndarray, weight: LoraWeight | None) -> Iterator[np.ndarray]:
    if weight is None:
        yield matrix
        return
    height = max(1, _BLOCK_ELEMENTS // math.prod(matrix.shape[1:]))
    for top in range(0, matrix.shape[0], height):
        rows = slice(top, top + height)
        yield fuse_block(matrix[rows], weight, rows)

"""W + scale * B @ A, shard by shard, with numpy: the same bytes on any machine, whichever backend trained."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from common.backend import Adapter, LoraWeight, Progress
from common.errors import UserError
from common.models.families import hf_name
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import DTYPES, copy_bytes

_BLOCK_ELEMENTS = 1 << 22  # at most this many weights in float32 at once: 16 MB an array


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
    base: ModelFolder,
    adapter: Adapter,
    out: Path,
    progress: Progress,
    replaced: Mapping[str, Callable[[], np.ndarray]] = MappingProxyType({}),
) -> None:
    """Write `base`'s shards into `out` with the adapter added; memory stays near a few blocks of 16 MB.

    replaced: by name, functions that make tensors used in place of the base's own, such as dequantized weights. Raises
    UserError when an adapted module is not among the base's weights.
    """
    replaced = {**replaced} | {name: partial(adapter.full.__getitem__, name) for name in adapter.full}
    missing = {f"{name}.weight" for name in adapter.weights} | set(replaced)
    embedding = next((name for name in adapter.full if name.endswith("embed_tokens.weight")), None)
    if embedding and "lm_head.weight" not in adapter.full:  # tied, though some checkpoints store it twice
        replaced["lm_head.weight"] = replaced[embedding]
    total, done = base.weight_bytes, 0
    for shard in base.shards:
        header, start = base.header(shard)
        with shard.open("rb") as source, (out / shard.name).open("wb") as file:
            file.write(source.read(start))  # the header: names, types and shapes do not change
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
                begin, end = entry["data_offsets"]
                name = hf_name(name)
                weight = adapter.weights.get(name.removesuffix(".weight"))
                missing.discard(name)
                source.seek(start + begin)
                if weight is None and name not in replaced:
                    copy_bytes(source, file, end - begin)
                else:
                    kind = DTYPES[entry["dtype"]]
                    given = replaced[name]() if name in replaced else None
                    for rows, block in _blocks(source, entry["shape"], kind, given):
                        fused = block if weight is None else fuse_block(block, weight, rows)
                        file.write(fused.astype(kind).tobytes())
                done += end - begin
                progress(done / total, f"fuse {name}")
    if missing:
        raise UserError(
            f"{base.path} has no weights for {len(missing)} trained modules, such as {min(missing)}.",
            "Give the base model that the adapter was trained on.",
        )


def _blocks(
    source: BinaryIO, shape: list[int], kind: np.dtype, given: np.ndarray | None
) -> Iterator[tuple[slice, np.ndarray]]:
    """A matrix, a few rows at a time: of `given`, or read from the current position of `source`."""
    width = math.prod(shape[1:])
    height = max(1, _BLOCK_ELEMENTS // width)
    for top in range(0, shape[0], height):
        rows = slice(top, min(top + height, shape[0]))
        if given is not None:
            yield rows, given[rows]
        else:
            count = (rows.stop - rows.start) * width
            stored = np.frombuffer(source.read(count * kind.itemsize), kind)
            yield rows, stored.reshape(-1, *shape[1:])


def differing(model: ModelFolder, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the float32 `tensors` that the model does not hold, rounded once to its own types."""
    missing = set(tensors)
    for stored_name, stored in model.tensors.items():
        if (name := hf_name(stored_name)) in missing:
            wanted = tensors[name].astype(DTYPES[stored.dtype]).tobytes()
            if b"".join(stored.chunks()) == wanted:
                missing.remove(name)
    return sorted(missing)

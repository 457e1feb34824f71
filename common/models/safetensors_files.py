"""Safetensors files, read without a framework and without mapping them into memory.

Mapped pages would count as this process's memory, a complete shard of them.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from common.documents import parse_json
from common.errors import UserError, first_line
from common.lazy_arrays import LazyArrays, shapes_of

# safetensors' names for the types that weights come in; the rest is copied as bytes.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_WHOLE = {f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_WHOLE |= {"bool": "BOOL"}
_COPY_BYTES = 1 << 24
_HEADER_BYTES = 100_000_000  # safetensors' own limit

Header = tuple[dict[str, dict[str, Any]], int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `size` bytes of `file` from `start` on. dtype: safetensors' name, such as BF16."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    def chunks(self, size: int = 1 << 22) -> Iterator[bytes]:
        """The tensor's bytes, at most `size` at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            for left in range(self.size, 0, -size):
                yield file.read(min(left, size))


def read_header(path: Path) -> Header:
    """A safetensors file's header (without its metadata) and where the data starts, in bytes.

    Format: 8 bytes little-endian header length, JSON, then the data (huggingface/safetensors). Raises UserError for a
    file that is cut off or damaged.
    """
    total = path.stat().st_size
    damaged = UserError(f"{path} is not a complete safetensors file.", "Fetch it again.")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(total - 8, _HEADER_BYTES):
            raise damaged
        try:
            header = parse_json(file.read(size))
        except ValueError:
            raise damaged from None
    header.pop("__metadata__", None)
    if not all(map(_sound, header.values())):
        raise damaged
    if 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0) != total:
        raise damaged
    return header, 8 + size


def _sound(entry: Any) -> bool:
    """Whether a header's entry has its three parts, and as many bytes as its shape asks for."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            counts = all(type(size) is int and size >= 0 for size in shape)
            known = DTYPES.get(dtype)
            wanted = end - begin if known is None else math.prod(shape) * known.itemsize if counts else -1
            return counts and 0 <= begin <= end and end - begin == wanted
    return False


def stored_tensors(path: Path, header: Header) -> dict[str, StoredTensor]:
    """The tensors of the file by their names, in the header's order."""
    entries, start = header
    found = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(path, start + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found


def copy_bytes(source: BinaryIO, file: BinaryIO, size: int) -> None:
    """Copy `size` bytes from the current position of `source`, a few at a time."""
    for left in range(size, 0, -_COPY_BYTES):
        file.write(source.read(min(left, _COPY_BYTES)))


def load_tensors(path: Path, fix: str) -> dict[str, np.ndarray]:
    """The file's tensors by name. Raises UserError where it cannot be read."""
    try:
        return load_file(path)
    except Exception as error:  # a cut file, a type that numpy has not
        raise UserError(f"{path} is damaged: {first_line(error)}", fix) from None


def lazy_tensors(path: Path, fix: str) -> LazyArrays:
    """The same in float32, each read when it is asked for; the file must stay until then."""
    try:
        stored = stored_tensors(path, read_header(path))
    except (UserError, OSError):
        raise UserError(f"{path} is damaged: it is missing, cut off, or no safetensors file.", fix) from None
    if other := [name for name, tensor in stored.items() if tensor.dtype not in DTYPES]:
        raise UserError(f"{path} is damaged: {other[0]} holds no weights.", fix)

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        count = math.prod(tensor.shape)
        array = np.fromfile(path, DTYPES[tensor.dtype], count, offset=tensor.start)
        if array.size != count:
            raise UserError(f"{path} was cut off while it was read.", fix)
        return array.reshape(tensor.shape).astype(np.float32, copy=False)

    return LazyArrays({name: tensor.shape for name, tensor in stored.items()}, read)


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, a tensor at a time: the library's own writer copies all of them first.

    Raises OSError with the file's name.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes_of(tensors).items():
        kind = np.dtype(np.float32) if isinstance(tensors, LazyArrays) else tensors[name].dtype
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _dtype_name(kind), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in tensors:
                array = np.ascontiguousarray(tensors[name])
                if array.dtype.byteorder == ">":
                    array = array.astype(array.dtype.newbyteorder("<"))
                file.write(array.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _dtype_name(kind: np.dtype) -> str:
    known = {str(kind): name for name, kind in DTYPES.items()} | _WHOLE
    return known[kind.newbyteorder("=").name if kind.byteorder == ">" else kind.name]

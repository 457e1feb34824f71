"""Arrays that are read one by one, where all of them at once would be another copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, ...]


class LazyArrays(Mapping[str, "np.ndarray"]):
    """float32 arrays by name, each read when it is asked for; read again, it may have changed."""

    def __init__(self, shapes: Mapping[str, Shape], read: Callable[[str], np.ndarray]) -> None:
        self.shapes, self._read = dict(shapes), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        array = self._read(name)
        if (array.shape, array.dtype) != (self.shapes[name], "float32"):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not float32 {self.shapes[name]}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    """By name, without reading what is lazy."""
    return arrays.shapes if isinstance(arrays, LazyArrays) else {name: array.shape for name, array in arrays.items()}


def joined(parts: Mapping[str, Mapping[str, np.ndarray]]) -> LazyArrays:
    """The arrays of all parts, each by its part's name, a dot and its own."""
    shapes = {f"{part}.{name}": shape for part, arrays in parts.items() for name, shape in shapes_of(arrays).items()}

    def read(name: str) -> np.ndarray:
        part, _, own = name.partition(".")
        return parts[part][own]

    return LazyArrays(shapes, read)


def part_of(arrays: LazyArrays, part: str) -> LazyArrays:
    """The arrays of one part of those that `joined` gave."""
    begin = f"{part}."
    shapes = {name.removeprefix(begin): shape for name, shape in arrays.shapes.items() if name.startswith(begin)}
    return LazyArrays(shapes, lambda name: arrays[begin + name])

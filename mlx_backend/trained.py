"""The trained arrays of a model. An adapter's are joined, so that a few kernels clip and update them."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from common.lazy_arrays import LazyArrays
from mlx_backend.confirmation import device_errors
from mlx_backend.weights import numpy_shape, stacked, to_mlx, to_numpy

Tensors = list[mx.array]
_NOTHING = mx.zeros(0, stream=mx.cpu)  # MLX for CUDA has no default stream where no GPU is seen
_PARTS = 10
_MOST = 2**20  # values in a joined tensor


class Trained:
    """Where the trained arrays lie, in tensors and in the model.

    A joined tensor holds arrays of one group of the optimizer, flat, one behind the other; of large groups there are
    several, because AdamW computes a dozen tensors of the same size in between.
    """

    def __init__(
        self,
        model: Any,
        paths: Mapping[str, str],
        groups: Sequence[Sequence[str]],
        join: bool,
        stacks: Mapping[str, Sequence[str]],
    ) -> None:
        """paths: the arrays' paths in the model, by name. groups: the optimizer's, of these names.

        stacks: of names that are not canonical, those of the array's parts.
        """
        modules = dict(model.named_modules())
        self.join, self._stacks, self._held = join, stacks, True
        # The type in which the model has them; None: their own. A float32 adapter would widen 16-bit activations, and
        # the backward pass would keep those.
        self.computed: mx.Dtype | None = None
        self._places: dict[str, tuple[Any, str]] = {}  # by name: the module, and its attribute
        for name, path in paths.items():
            module, _, attribute = path.rpartition(".")
            self._places[name] = modules[module], attribute
        self._shapes = {name: getattr(*place).shape for name, place in self._places.items()}
        self.names, self.group = list[list[str]](), list[int]()  # of each tensor
        for number, members in enumerate(groups):
            parts = self._together(members) if join else [[name] for name in members]
            self.names += parts
            self.group += [number] * len(parts)

    def _together(self, names: Sequence[str]) -> list[list[str]]:
        """The names in parts, whose arrays have no more than _MOST values in all, or are one."""
        parts: list[list[str]] = []
        size = _MOST + 1
        for name in names:
            size += (own := math.prod(self._shapes[name]))
            if size > _MOST:
                parts.append([])
                size = own
            parts[-1].append(name)
        return parts

    def read(self) -> Tensors:
        """The tensors of what the model holds."""
        return self.joined({name: getattr(*place) for name, place in self._places.items()})

    def joined(self, arrays: Mapping[str, mx.array]) -> Tensors:
        """The tensors of arrays by name."""
        parts = ([arrays[name] for name in names] for names in self.names)
        return [mx.concatenate([part.flatten() for part in some]) if self.join else some[0] for some in parts]

    def to_tensors(self, arrays: Mapping[str, np.ndarray]) -> Tensors:
        """The tensors of numpy's arrays by name."""
        found = {name: to_mlx(name, array) for name, array in arrays.items()}
        return self.joined(
            found | {stack: stacked([found[name] for name in parts]) for stack, parts in self._stacks.items()}
        )

    def to_numpy(self, tensors: Sequence[mx.array]) -> LazyArrays:
        """numpy's arrays by name, which raise OutOfMemory."""
        with device_errors():
            arrays = self.cut(tensors)
            for stack, parts in self._stacks.items():
                arrays |= {name: matrix.T for name, matrix in zip(parts, arrays.pop(stack), strict=True)}

        def read(name: str) -> np.ndarray:
            with device_errors():
                return to_numpy(name, arrays[name])

        return LazyArrays({name: numpy_shape(name, array) for name, array in arrays.items()}, read)

    def cut(self, tensors: Sequence[mx.array]) -> dict[str, mx.array]:
        """The arrays by name; those of a joined tensor are views of it."""
        found: dict[str, mx.array] = {}
        for names, tensor in zip(self.names, tensors, strict=True):
            parts = _split(tensor, [math.prod(self._shapes[name]) for name in names]) if self.join else [tensor]
            found |= {name: part.reshape(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return found

    def release(self) -> None:
        """Have the model hold none: those of a step would lie beside those of the next.

        A compiled step puts some there only while it is traced.
        """
        if self._held:
            for module, attribute in self._places.values():
                setattr(module, attribute, _NOTHING)
        self._held = False

    def put(self, tensors: Sequence[mx.array]) -> None:
        """Have the model compute with these tensors."""
        self._held = True
        if self.computed is not None:
            tensors = [tensor.astype(self.computed) for tensor in tensors]
        for name, array in self.cut(tensors).items():
            module, attribute = self._places[name]
            setattr(module, attribute, array)


def _split(tensor: mx.array, sizes: Sequence[int]) -> list[mx.array]:
    """Views of these sizes, whose gradients are concatenated.

    MLX makes more than ten parts by slicing, and the gradient of each slice is as long as the tensor.
    """
    if len(sizes) == 1:
        return [tensor]
    each = -(-len(sizes) // _PARTS)
    groups = [sizes[start : start + each] for start in range(0, len(sizes), each)]
    parts: Any = mx.split(tensor, list(accumulate(sum(group) for group in groups[:-1])))
    return [view for part, group in zip(parts, groups, strict=True) for view in _split(part, group)]

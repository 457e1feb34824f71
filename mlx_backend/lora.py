"""mlx-lm's LoRA and DoRA layers on a model, each with the rank and scale of its own weight."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from common.backend import Adapter
from mlx_backend.model import module_path
from mlx_backend.weights import PARTS, to_mlx


def attach(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Attach `adapter` to the frozen `model`. Returns its layers by Hugging Face module name."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    modules = dict(model.named_modules())
    layers = {}
    for name, weight in sorted(adapter.weights.items()):
        kind = LoRALinear if weight.magnitude is None and not adapter.dora else DoRALinear
        linear = modules[module_path(model, name)]
        layers[name] = kind.from_base(linear, r=weight.rank, scale=weight.scale)
        for part, array in weight.parts().items():
            setattr(layers[name], PARTS[part], to_mlx(part, array))
    put(model, layers)
    return layers


class Dropout:
    """Dropout in place of the LoRA layers' own. Each has a key, so one that is recomputed draws its mask again."""

    def __init__(self, layers: Iterable[Any], share: float) -> None:
        """share: of a layer's inputs, how many become 0."""
        self.share, self.count, self.keys = share, 0, mx.zeros((0, 2), mx.uint32)
        for layer in layers if share else ():
            layer.dropout = partial(self._drop, self.count)
            self.count += 1

    def begin(self, key: mx.array) -> None:
        """Draw masks from this key from now on."""
        if self.count:
            self.keys = mx.random.split(key, self.count)

    def end(self) -> None:
        """Drop nothing from now on."""
        self.keys = mx.zeros((0, 2), mx.uint32)

    def _drop(self, number: int, x: mx.array) -> mx.array:
        if not len(self.keys):
            return x
        kept = mx.random.bernoulli(1 - self.share, x.shape, self.keys[number])
        return kept * x * (1 / (1 - self.share))


def paths(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """The canonical names of the trained arrays -> their paths in the model."""
    parts = [part for part in PARTS if part != "magnitude" or adapter.dora]
    modules = {name: module_path(model, name) for name in adapter.weights}
    return {f"{name}.{part}": f"{path}.{PARTS[part]}" for name, path in modules.items() for part in parts}


def put(model: nn.Module, modules: dict[str, Any]) -> None:
    """Replace modules of the model, given by their Hugging Face names."""
    model.update_modules(tree_unflatten([(module_path(model, name), module) for name, module in modules.items()]))


@contextmanager
def detached(model: Any, layers: dict[str, Any]) -> Iterator[None]:
    """Within the context the model computes without these of its LoRA layers."""
    put(model, {name: layer.linear for name, layer in layers.items()})
    try:
        yield
    finally:
        put(model, layers)

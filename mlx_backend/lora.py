"""mlx-lm's LoRA and DoRA layers on a model, each with the rank and scale of its own weight."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from common.backend import Adapter
from common.models.experts import by_stack
from mlx_backend.layers import replace_call
from mlx_backend.model import module_path
from mlx_backend.weights import PARTS, stacked, to_mlx


def attach(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """Attach `adapter` to the frozen `model`. Returns its layers by Hugging Face module name, or stack of experts."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

    modules = dict(model.named_modules())
    layers = {}
    for name, members in sorted(by_stack(adapter.weights).items()):
        weights = [adapter.weights[member] for member in members]
        kind = LoRALinear if weights[0].magnitude is None and not adapter.dora else DoRALinear
        kind = kind if members == [name] else LoRASwitchLinear
        linear = modules[module_path(model, name)]
        layers[name] = kind.from_base(linear, r=weights[0].rank, scale=weights[0].scale)
        if kind is DoRALinear:
            layers[name]._squares = mx.square(layers[name].m)  # no parameter, by its name
            mx.eval(layers[name]._squares)
            replace_call(layers[name], _dora)
        for part in weights[0].parts():
            arrays = [to_mlx(part, weight.parts()[part]) for weight in weights]
            setattr(layers[name], PARTS[part], arrays[0] if members == [name] else stacked(arrays))
        if kind is LoRALinear:
            replace_call(layers[name], _adapted)
    put(model, layers)
    return layers


def _adapted(self: Any, x: mx.array) -> mx.array:
    """`linear(x) + scale * x @ A @ B`, the second product added to the first's result."""
    return mx.addmm(self.linear(x), self.dropout(x) @ self.lora_a, self.lora_b, alpha=self.scale)


def _dora(self: Any, x: mx.array) -> mx.array:
    """DoRA in the type of x. `W + scale * B @ A` is never made; its rows' length is a constant in the backward pass."""
    product, scale = partial(_product, self.linear), self.scale
    A, B = self.lora_a.astype(x.dtype), self.lora_b  # [in, r], [r, out]
    more = B * (2 * scale * product(A.T) + scale**2 * (A.T.astype(mx.float32) @ A.astype(mx.float32)) @ B)
    length = mx.stop_gradient(mx.sqrt(mx.maximum(self._squares + more.sum(axis=0), 1e-8 * self._squares)))
    result: Any = mx.addmm(product(x), self.dropout(x) @ A, B.astype(x.dtype), alpha=scale)
    result = _stretched(result, self.m / length - 1)
    if "bias" in self.linear:
        result = result + self.linear.bias
    return cast(mx.array, result)


@mx.custom_function
def _stretched(x: mx.array, gain: mx.array) -> mx.array:
    """`x * (1 + gain)` for x [..., out]; less 1, as bf16 has no number between 1 and 1.0078. Of x nothing is kept."""
    return x + x * gain.astype(x.dtype)


@_stretched.vjp
def _stretched_vjp(primals: Any, grad_output: mx.array, output: mx.array) -> tuple[mx.array, mx.array]:
    x, gain = primals
    both = grad_output.astype(mx.float32) * output.astype(mx.float32)
    grad_gain = both.reshape(-1, both.shape[-1]).sum(axis=0) / (1 + gain)
    # at once: it would be computed at the end of a step, and every layer would keep both until then
    (grad_output,) = mx.depends([grad_output], [grad_gain])
    return grad_output + grad_output * gain.astype(x.dtype), grad_gain


def _product(linear: Any, x: mx.array) -> mx.array:
    """`x @ W.T`"""
    if not isinstance(linear, nn.QuantizedLinear):
        return x @ linear.weight.T
    settings = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
    return mx.quantized_matmul(x, linear.weight, linear.scales, linear.get("biases"), True, **settings)


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
    """The names of the trained arrays, canonical but for stacks of experts' -> their paths in the model."""
    modules = {name: module_path(model, name) for name in by_stack(adapter.weights)}
    return {f"{name}.{part}": f"{path}.{PARTS[part]}" for name, path in modules.items() for part in _parts(adapter)}


def stacks(adapter: Adapter) -> dict[str, list[str]]:
    """The names of the trained arrays that are stacked -> the canonical names of their parts, expert by expert."""
    experts = {name: members for name, members in by_stack(adapter.weights).items() if members != [name]}
    return {
        f"{name}.{part}": [f"{member}.{part}" for member in members]
        for name, members in experts.items()
        for part in _parts(adapter)
    }


def _parts(adapter: Adapter) -> list[str]:
    return [part for part in PARTS if part != "magnitude" or adapter.dora]


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

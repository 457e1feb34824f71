"""Our attention and MLP in place of mlx-lm's."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_backend import gemma4
from mlx_backend.attention import attend
from mlx_backend.linear_attention import convolve, mix
from mlx_backend.mlp import feed_forward


def install(model: Any, kind: str) -> None:
    """Replace the calls of every layer's attention and MLP. kind: the model's type.

    Each part gets a class of its own, so that no other model of the process is touched.
    """
    for layer in model.layers:
        if kind.startswith("gemma4"):
            replace_call(layer.self_attn, gemma4.attend)
            layer.freeze(keys="layer_scalar", recurse=False)  # a buffer in transformers
        elif "self_attn" in layer:
            replace_call(layer.self_attn, attend)
        elif "linear_attn" in layer:
            replace_call(layer.linear_attn, mix)
        else:
            replace_call(layer.conv, convolve)
        mlp = layer.feed_forward if "feed_forward" in layer else layer.mlp
        replace_call(mlp, feed_forward)
        mlp.gelu = kind.startswith("gemma")
        if kind == "lfm2":
            replace_call(layer, _lfm2_layer)
    if kind == "qwen3_5_text":
        for module in model.modules():
            if type(module) is nn.RMSNorm:
                replace_call(module, _centered_norm)


def turn_convolutions(model: Any) -> None:
    """Have the weights of convolutions in the layout of torch."""
    for layer in model.layers:
        if "self_attn" not in layer:
            convolution = layer.linear_attn.conv1d if "linear_attn" in layer else layer.conv.conv
            convolution.weight = convolution.weight.swapaxes(1, 2)


def _lfm2_layer(self: Any, x: mx.array, mask: Any, rows: Any) -> mx.array:
    """mlx-lm's own hands mask and cache on by their names."""
    operator = self.self_attn if self.is_attention_layer else self.conv
    x = x + operator(self.operator_norm(x), mask, rows)
    return x + self.feed_forward(self.ffn_norm(x))


def join_mlp(layer: Any, config: dict[str, Any]) -> None:
    """Give a layer of Granite 3 the MLP of Granite 4: one matrix for gate and up, and names of its own."""
    from mlx_lm.models.granitemoehybrid import GraniteMoeHybridSharedMLP

    kind = type(layer)
    layer.pop("mlp")
    layer.__class__ = type(kind.__name__, (kind,), {"mlp": property(lambda self: self["shared_mlp"])})
    sizes = {key: config[key] for key in ("hidden_size", "shared_intermediate_size")}
    layer.shared_mlp = GraniteMoeHybridSharedMLP(SimpleNamespace(**sizes))


def _centered_norm(self: Any, x: mx.array) -> mx.array:
    """RMS norm by a weight that is stored less one."""
    weight = 1 + self.weight.astype(mx.float32)  # rounded once, as in transformers
    return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


def replace_call(module: Any, call: Any) -> None:
    """Give the module a class of its own with this `__call__`."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

"""Our attention and MLP in place of mlx-lm's."""

from typing import Any

from mlx_backend.attention import attend
from mlx_backend.mlp import feed_forward


def install(model: Any, gelu: bool) -> None:
    """Replace the calls of every layer's attention and MLP. gelu: the MLP's activation is GELU, else SiLU.

    Each part gets a class of its own, so that no other model of the process is touched.
    """
    for layer in model.layers:
        _replace_call(layer.self_attn, attend)
        _replace_call(layer.mlp, feed_forward)
        layer.mlp.gelu = gelu


def _replace_call(module: Any, call: Any) -> None:
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})

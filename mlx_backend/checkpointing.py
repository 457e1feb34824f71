"""Gradient checkpointing: a layer keeps its input only, and recomputes the rest in the backward pass."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_backend.trained import Tensors


def checkpoint_layers(model: Any, wanted: bool) -> None:
    """Checkpoint each of the model's layers, or none. A layer gets a class of its own: no other model is touched."""
    for layer in model.layers:
        kind = type(layer)
        if wanted and not hasattr(kind, "plain"):
            call = _checkpointed(kind)
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "plain": kind})
        elif not wanted and hasattr(kind, "plain"):
            layer.__class__ = kind.plain


def _checkpointed(kind: type) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

        named = tree_flatten(self.trainable_parameters())
        if not named:  # a layer without an adapter
            return mx.checkpoint(inner)({}, *args, **kwargs)
        tied: Any = _together([array for _, array in named], args[0])
        arrays, hidden = tied
        parameters = tree_unflatten([(name, array) for (name, _), array in zip(named, arrays, strict=True)])
        return mx.checkpoint(inner)(parameters, hidden, *args[1:], **kwargs)

    return call


@mx.custom_function
def _together(parameters: Tensors, hidden: mx.array) -> tuple[Tensors, mx.array]:
    """Both as they are. In the backward pass the layers before wait for the gradients of `parameters`.

    Else those are computed last where they are parts of one tensor, and until then every layer keeps what it
    recomputed: SmolLM2's step of 1,024 tokens took 1.65 GB, and with this 0.87.
    """
    return parameters, hidden


@_together.vjp
def _together_vjp(primals: Any, cotangents: tuple[Tensors, mx.array], outputs: Any) -> tuple[Tensors, mx.array]:
    parameters, hidden = cotangents
    return parameters, mx.depends([hidden], parameters)[0]

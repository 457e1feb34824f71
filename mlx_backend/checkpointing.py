"""Gradient checkpointing: a layer keeps its input only, and recomputes the rest in the backward pass."""

from typing import Any

import mlx.core as mx


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

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return call

"""Gradient checkpointing: a layer keeps its input only, and recomputes the rest in the backward pass."""

from typing import Any

import mlx.core as mx
import numpy as np


def checkpoint_layers(model: Any, wanted: bool, dropout: bool) -> None:
    """Checkpoint each of the model's layers, or none. A layer gets a class of its own: no other model is touched.

    With dropout, recomputing starts from the same random seed, so that it draws the same masks.
    """
    for layer in model.layers:
        kind = type(layer)
        if wanted and not hasattr(kind, "plain"):
            call = _checkpointed(kind, dropout)
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "plain": kind})
        elif not wanted and hasattr(kind, "plain"):
            layer.__class__ = kind.plain


def _checkpointed(kind: type, dropout: bool) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]
        seed = int(np.array(mx.random.randint(0, 2**31 - 1))) if dropout else 0

        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            if dropout:
                mx.random.seed(seed)
            return kind.__call__(self, *args, **kwargs)  # type: ignore[operator]

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    return call

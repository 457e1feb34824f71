"""The experts of a mixture, which mlx-lm stacks in one module a layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.models.experts import Choices


@contextmanager
def counted(model: nn.Module) -> Iterator[Choices]:
    """Within it, what the model's routers choose is counted. Mlx-lm gives a layer's experts the choice.

    They get a class of their own meanwhile: no other model is touched.
    """
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    choices = Choices()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, SwitchGLU | SwitchMLP) and "layers." in name:
                experts = next(part.num_experts for part in module.modules() if hasattr(part, "num_experts"))
                stack.callback(setattr, module, "__class__", type(module))
                module.__class__ = _counting(type(module), choices.of(name, experts))
        yield choices


def _counting(kind: type, count: Callable[[np.ndarray], None]) -> type:
    def call(self: Any, x: mx.array, indices: mx.array, *more: Any) -> mx.array:
        count(np.array(indices))
        return kind.__call__(self, x, indices, *more)  # type: ignore[operator]

    return type(kind.__name__, (kind,), {"__call__": call})

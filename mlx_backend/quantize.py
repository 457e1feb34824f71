"""MLX's own quantization of the frozen base's linear layers: quantize and dequantize."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from common.errors import UserError
from common.recipe import TARGET_GROUPS
from mlx_backend.confirmation import Confirmation, device_errors


def quantize(model: Any, scheme: str) -> None:
    """Quantize the linear layers that can be adapted by a scheme such as `mlx-4bit-64`: 4 bits, groups of 64.

    Layer by layer, to save memory. Raises UserError where the rows of a weight do not divide into such groups.
    """
    bits, group = int(scheme.split("-")[1].removesuffix("bit")), int(scheme.split("-")[2])
    for layer in model.layers:
        for name, module in layer.named_modules():
            if _adaptable(name, module) and module.weight.shape[-1] % group:
                raise UserError(
                    f"--quantization {bits}bit: {name} has {module.weight.shape[-1]} columns, "
                    f"which is not a multiple of {group}.",
                    "Leave --quantization out.",
                )
        nn.quantize(layer, group, bits, class_predicate=_adaptable)
        mx.eval(layer.parameters())


def _adaptable(name: str, module: Any) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGET_GROUPS["all-linear"]


def dequantized(model: Any, names: dict[str, str], confirmation: Confirmation) -> dict[str, Callable[[], np.ndarray]]:
    """See `common.backend.Backend`. names: of a tensor in the language model alone -> in the checkpoint."""
    return {
        names[f"{name.removesuffix('.linear')}.weight"]: partial(_dequantize, module, confirmation)
        for name, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear)
    }


def _dequantize(module: Any, confirmation: Confirmation) -> np.ndarray:
    with device_errors():
        weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits, module.mode)
        array = np.array(weight.astype(mx.float32))
        confirmation.settle([])
    return array

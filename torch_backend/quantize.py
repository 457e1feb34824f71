"""bitsandbytes' nf4 and int8 for the frozen base's linear layers, and the way back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch


def quantization_config(scheme: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` must be told; None for a base that is not quantised. The output head stays."""
    from transformers import BitsAndBytesConfig

    if scheme == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def dequantized(model: Any, names: dict[str, str]) -> dict[str, Callable[[], np.ndarray]]:
    """See the seam. `names`: a tensor's name within the language model -> in the whole one."""
    return {
        names[f"{name.removesuffix('.base_layer')}.weight"]: partial(_dequantize, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer")
    }


@torch.no_grad()
def _dequantize(module: Any) -> np.ndarray:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).float().cpu().numpy()

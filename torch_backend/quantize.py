"""bitsandbytes' nf4 and int8 for the frozen base's linear layers: quantize and dequantize."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from common.recipe import TARGET_GROUPS
from torch_backend.host_memory import release_pages

# Beside the head: around Gemma 4's embeddings of each layer, which are not adapted either.
_KEPT = ["lm_head", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"]


def quantization_config(scheme: str) -> Any:
    """The setting of `from_pretrained` for int8; None for every other base."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_KEPT) if scheme == "int8" else None


@torch.no_grad()
def quantize_nf4(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize the linear layers that can be adapted to nf4, releasing each one's pages at once.

    The same as transformers does, but that keeps all that it has read of the file until the complete model is loaded.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if type(module) is not torch.nn.Linear or last not in TARGET_GROUPS["all-linear"]:
            continue
        stored = module.weight.data
        made = Linear4bit(module.in_features, module.out_features, False, dtype, quant_type="nf4", device="meta")
        made.weight = Params4bit(stored.to(dtype), requires_grad=False, quant_type="nf4").to(device)
        # When it evaluates on a CPU it would change the layout of the weight, for a product without a gradient.
        made.support_avx512bf16_for_cpu = False
        made.bias = module.bias
        release_pages(stored)
        setattr(model.get_submodule(parent), last, made)
    model.is_loaded_in_4bit = True  # what PEFT looks for


def dequantized(model: Any, names: dict[str, str]) -> dict[str, Callable[[], np.ndarray]]:
    """See `common.backend.Backend`. names: of a tensor in the language model alone -> in the checkpoint."""
    return {
        names[f"{name.removesuffix('.base_layer')}.weight"]: partial(_dequantize, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer")
    }


@torch.no_grad()
def _dequantize(module: Any) -> np.ndarray:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module).float().cpu().numpy()

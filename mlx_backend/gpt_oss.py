"""gpt-oss in 16 or 32 bits: mlx-lm 0.32.2 knows its experts as published, in MXFP4, and computes another YaRN."""

from typing import Any

import mlx.core as mx

KIND = "gpt_oss"


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """What makes mlx-lm's model of its settings, and the class of these; a gpt-oss reads what transformers saves.

    Raises what mlx-lm raises for a model type that it does not know.
    """
    from mlx_lm.utils import _get_classes

    model_class, settings_class = _get_classes(config)

    def make(settings: Any) -> Any:
        model = model_class(settings)
        sanitize = model.sanitize
        model.sanitize = lambda weights: sanitize(named(weights))
        return model

    return (make if config["model_type"] == KIND else model_class), settings_class


def named(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors with the experts as mlx-lm holds them.

    transformers has gate and up in turns in one stack [experts, inputs, outputs]. mlx-lm has a stack of each,
    [experts, outputs, inputs].
    """
    found = {}
    for name, weight in weights.items():
        stack, _, kind = name.removesuffix("_bias").rpartition(".")
        if not stack.endswith(".experts"):
            found[name] = weight
            continue
        end, turned = ("bias", weight) if name.endswith("_bias") else ("weight", weight.swapaxes(-1, -2))
        parts = {kind: turned}
        if kind == "gate_up_proj":
            parts = {"gate_proj": turned[:, ::2], "up_proj": turned[:, 1::2]}
        found |= {f"{stack}.{part}.{end}": array for part, array in parts.items()}
    return found

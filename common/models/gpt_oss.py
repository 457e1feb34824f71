"""gpt-oss in 16 or 32 bits: what mlx-lm 0.32.2 does not read of it, which knows its experts as published, in MXFP4."""

from typing import Any

KIND = "gpt_oss"


def mlx_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes of a model and its settings; a gpt-oss takes its tensors as transformers saves them.

    Raises ValueError where mlx-lm does not know the model type, and whatever a module of its models raises.
    """
    from mlx_lm.utils import _get_classes

    model_class, settings_class = _get_classes(config)

    def make(settings: Any) -> Any:
        model = model_class(settings)
        sanitize = model.sanitize
        model.sanitize = lambda weights: sanitize(mlx_weights(weights))
        return model

    return (make if config["model_type"] == KIND else model_class), settings_class


def mlx_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """The tensors with the experts as mlx-lm holds them. weights: names and arrays, as transformers saves them.

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

"""The frozen base model: mlx-lm's layers, in a forward pass that computes what transformers does.

mlx-lm 0.32 knows no sliding windows for Mistral, Qwen, Phi-3 and Gemma 2, rotates every Phi-3 row by the long factors,
rounds Gemma 3's embedding scale to bf16, and reads RoPE from keys that a checkpoint may not have. So only its layers
are used; everything around them is computed here from the normalized config.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from common.errors import UserError, first_line, masked
from common.models.experts import expert_names, mlx_stack, stack_in_mlx
from common.models.families import (
    ForwardConfig,
    forward_config,
    language_tensor,
    mlx_type,
    normalize_config,
    text_name,
)
from common.models.mlx_quantized import is_mlx_layout, usual_layout
from common.models.model_folder import ModelFolder
from mlx_backend import gpt_oss
from mlx_backend.attention import RaggedRows
from mlx_backend.gemma4 import run_layers
from mlx_backend.layers import install, join_mlp, turn_convolutions
from mlx_backend.rope import Rope, rope

_TORCH = "Train it with --backend torch."
_KINDS = ("full_attention", "sliding_attention")
# Models whose layers are those of another in mlx-lm.
_SAME_LAYERS = {"gemma4_unified_text": "gemma4_text", "granitemoehybrid": "granite", "ministral3": "llama"}
DTYPES = {"bf16": mx.bfloat16, "fp32": mx.float32}


class _Rope(nn.Module):
    """Rotates x [B, heads, T, head_dim] by positions from `offset` on; see `mlx_backend.rope`."""

    def __init__(self, found: Rope, interleaved: bool) -> None:
        """interleaved: each value of a head is paired with the next, else with that of the other half."""
        super().__init__()
        self._split, self._factor, self._interleaved = found.split, found.factor, interleaved
        self._width = 2 * len(found.inverse)
        self._short, self._long = (
            mx.array(_inverted(inverse).astype("float32")) for inverse in (found.inverse, found.inverse_long)
        )

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        longer = self._split is not None and x.shape[-2] + offset > self._split
        if self._factor != 1.0:
            x = x.at[..., : self._width].multiply(self._factor)
        freqs = self._long if longer else self._short
        return mx.fast.rope(
            x, self._width, traditional=self._interleaved, base=None, scale=1.0, offset=offset, freqs=freqs
        )


def _inverted(frequencies: np.ndarray) -> np.ndarray:
    """Infinite where a frequency is 0, which rotates nothing."""
    with np.errstate(divide="ignore"):
        found: np.ndarray = 1 / frequencies
    return found


def _unrotated(x: mx.array, offset: int = 0) -> mx.array:
    return x


def load_base(base: ModelFolder, dtype: mx.Dtype, full: bool = False) -> Any:
    """The language model alone, in `dtype`, lazily loaded, with its ForwardConfig as `forward_config`.

    A table of embeddings of each layer stays in 16 bits as it is stored, unless it is trained (full).
    Raises UserError where checkpoint and model do not have the same weights.
    """
    from mlx_lm.utils import _get_classes, load_model

    config = base.config
    found, kind = forward_config(config), config["model_type"]

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        if kind == "qwen3_5_text":
            from mlx_lm.models.qwen3_5 import TextModel as model_class
            from mlx_lm.models.qwen3_5 import TextModelArgs as arguments
        else:
            model_class, arguments = _get_classes(config | {"model_type": _SAME_LAYERS.get(kind, kind)})

        def make(args: Any) -> Any:
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)
            if kind in ("lfm2", "qwen3_5_text"):  # our layers take the weights as they are stored
                sanitize = partial(usual_layout, kind=kind) if is_mlx_layout(base) else dict
                turn_convolutions(model)
            if kind == "granitemoehybrid":
                for layer in model.layers:
                    join_mlp(layer, config)
            model.sanitize = lambda weights: sanitize(_language_model(weights, tied=config["tie_word_embeddings"]))
            return model

        return make, arguments

    # windows and RoPE are ours: mlx-lm need not understand, or refuse, what the config says of them
    plain = {**config, "rope_scaling": None, "rope_parameters": None, "layer_types": None}
    if kind in ("exaone4", "olmo3"):  # of the latter mlx-lm looks for both kinds, however few layers there are
        plain |= {"sliding_window_pattern": None, "layer_types": [*_KINDS] * config["num_hidden_layers"]}
    if kind.startswith("gemma4"):
        plain |= {name: config.get(name) for name in ("layer_types", "hidden_size_per_layer_input")}
    plain["model_file"] = None  # code of the folder's own, which mlx-lm would refuse
    try:
        model = load_model(base.path, lazy=True, model_config=plain, get_model_classes=classes)[0]
    except ValueError as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"{base.path}: weights and config.json do not match: {first}", "Fetch the model again."
        ) from None
    floats = [(n, p) for n, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    table = "model.embed_tokens_per_layer.weight"
    model.update(tree_unflatten([(n, p.astype(dtype)) for n, p in floats if n != table or full or p.itemsize != 2]))
    _set_positions(model, config, found)
    install(model, kind)
    model.forward_config, model.layers_at = found, "model.layers."
    return model


def _set_positions(model: Any, config: dict[str, Any], found: ForwardConfig) -> None:
    """Give each attention the positions of `found` in place of what mlx-lm reads from the config."""
    for layer, parameters in zip(model.layers, found.ropes, strict=True):
        if parameters is not None:
            width = layer.self_attn.head_dim if "global_head_dim" in config else config["head_dim"]
            found_rope = rope(parameters, width, config["max_position_embeddings"])
            layer.self_attn.rope = _Rope(found_rope, interleaved=config["model_type"] == "glm4")
        elif "self_attn" in layer:
            layer.self_attn.rope = _unrotated
        if found.query_scaling is not None:
            layer.self_attn.query_scaling = found.query_scaling


def load_plain(base: ModelFolder, dtype: mx.Dtype) -> Any:
    """A model of an architecture without layers of ours: mlx-lm's own, in `dtype`, lazily loaded.

    Of a multimodal model mlx-lm itself takes the text part. Raises UserError where it does not know the architecture,
    or checkpoint and model do not have the same weights.
    """
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import load_model

    config = _mlx_config(base)
    try:
        model = load_model(base.path, lazy=True, model_config=config, get_model_classes=gpt_oss.classes)[0]
    except Exception as error:  # whatever a model's code makes of a config that it does not expect
        what = " ".join(masked(str(error)).split())[:200]
        raise UserError(f"mlx-lm cannot load this model: {what}", _TORCH) from None
    mixture = any(type(module) is SwitchLinear for module in model.modules())
    if mixture and dtype != mx.float32 and mx.default_device() == mx.cpu:
        raise UserError("MLX computes experts in float32 alone on a CPU.", "Use --precision fp32, or --backend torch.")
    kept = getattr(model, "cast_predicate", lambda name: True)
    floats = [(n, p.astype(dtype)) for n, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    model.update(tree_unflatten([(name, parameter) for name, parameter in floats if kept(name)]))
    if config["model_type"] == gpt_oss.KIND:  # mlx-lm rounds the range over which its YaRN blends
        if "rope_parameters" not in config:
            raise UserError(
                f"{base.path}: config.json states no RoPE, which a gpt-oss needs.", "Fetch the model again."
            )
        for layer in model.layers:
            found = rope(config["rope_parameters"], layer.self_attn.head_dim, config["max_position_embeddings"])
            layer.self_attn.rope = _Rope(found, interleaved=False)
    model.forward_config = forward_config(base.config)
    model.layers_at = _layers_at(model)
    return model


def plain_layers(base: ModelFolder) -> dict[str, tuple[int, int]]:
    """See `common.backend_package.BackendPackage`."""
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.utils import _get_classes

    config = _mlx_config(base)
    try:
        model_class, arguments = _get_classes(config)
    except (ValueError, SystemExit) as error:  # which a module raises that wants another library
        raise UserError(f"mlx-lm does not know this model: {first_line(error)}", _TORCH) from None
    try:  # either may make anything of a config that it does not expect
        settings = arguments.from_dict(config)
    except Exception as error:
        raise UserError(f"mlx-lm cannot read this config: {first_line(error)}", _TORCH) from None
    try:
        model = model_class(settings)
    except Exception as error:
        raise UserError(f"mlx-lm cannot make this model: {first_line(error)}", _TORCH) from None
    at = _layers_at(model)
    modules = {name.removeprefix(at): module for name, module in model.named_modules() if name.startswith(at)}
    linear = {name: module.weight.shape for name, module in modules.items() if type(module) is nn.Linear}
    stacks = {stack_in_mlx(name): m.weight.shape for name, m in modules.items() if type(m) is SwitchLinear}
    return linear | {
        name: shape[1:] for stack, shape in stacks.items() if stack for name in expert_names(stack, shape[0])
    }


def _mlx_config(base: ModelFolder) -> dict[str, Any]:
    """As mlx-lm reads it: of a language model that was saved alone, as a part of the model that it knows."""
    config = normalize_config(base.written_config) | {"model_file": None}
    kind = str(config.get("model_type"))
    return config if mlx_type(kind) == kind else config | {"model_type": mlx_type(kind), "text_config": config}


def _layers_at(model: Any) -> str:
    """What stands before a layer's number in the names of modules."""
    return next(name for name, module in model.named_modules() if module is model.layers[0]).removesuffix("0")


def module_path(model: Any, name: str) -> str:
    """Where a loaded model has the module, or stack of experts, of this Hugging Face name in one of its layers."""
    return str(model.layers_at + mlx_stack(name.split("layers.", 1)[1]))


def _language_model(weights: dict[str, mx.array], tied: bool) -> dict[str, mx.array]:
    """A checkpoint's tensors under the names of the language model alone."""
    named = {text_name(name): weight for name, weight in weights.items()}
    return {name: weight for name, weight in named.items() if language_tensor(name, tied)}


def hidden_states(model: Any, input_ids: mx.array, rows: RaggedRows, caches: list[Any] | None = None) -> mx.array:
    """The last hidden states [tokens, hidden] of input ids [tokens], packed.

    With `caches`, a KVCache for each layer, the ids continue the one row whose keys and values the caches hold, and
    are added to them.
    """
    config: ForwardConfig = model.forward_config
    h = model.model.embed_tokens(input_ids)
    if config.embedding_scale != 1.0:
        h = h * config.embedding_scale  # a Python number: it takes h's type, as in transformers
    capped = "self_attn" in model.layers[0] and hasattr(model.layers[0].self_attn, "attn_logit_softcapping")
    cached = caches[0].offset if caches else 0
    by_window = {window: _mask(rows.width, window, capped, cached) for window in set(config.windows)}
    masks = [by_window[window] for window in config.windows]
    each = [replace(rows, cache=cache) for cache in caches] if caches else [rows] * len(masks)
    if hasattr(model.model, "previous_kvs"):
        return model.model.norm(run_layers(model, input_ids, h, masks, each))
    for layer, mask, own in zip(model.layers, masks, each, strict=True):
        h = layer(h, mask, own)
    norm = model.model.norm if "norm" in model.model else model.model.embedding_norm
    return norm(h)


def _mask(length: int, window: int | None, capped: bool, cached: int) -> mx.array | str:
    """[length, cached + length]: whether a query may see a key, for queries that follow `cached` keys.

    "causal" where MLX's kernel makes the mask itself, which it does not for capped scores.
    """
    if not capped and (window is None or window >= cached + length):
        return "causal"
    positions = mx.arange(cached + length)
    distance = positions[cached:, None] - positions[None]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def head(model: Any, hidden: mx.array) -> mx.array:
    """Hidden states to float32 logits, embeddings tied or not."""
    return finish(model, project(model, hidden))


def project(model: Any, hidden: mx.array, weight: mx.array | None = None) -> mx.array:
    """Hidden states times the head's own [vocabulary, H], or `weight` in its place; in the model's type."""
    if weight is not None:
        return hidden @ weight.T
    return model.lm_head(hidden) if "lm_head" in model else model.model.embed_tokens.as_linear(hidden)


def finish(model: Any, raw: mx.array) -> mx.array:
    """Logits in float32 from the head's products: what a family does after its head."""
    logits = raw.astype(mx.float32)
    if model.forward_config.logit_divisor != 1.0:
        logits = logits / model.forward_config.logit_divisor
    if cap := model.forward_config.logit_softcap:
        logits = mx.tanh(logits / cap) * cap
    return logits


def head_weight(model: Any) -> mx.array | None:
    """The weight that `project` multiplies by, where it is trained; None where it is frozen."""
    layer = model.lm_head if "lm_head" in model else model.model.embed_tokens
    return layer.trainable_parameters().get("weight")

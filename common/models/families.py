"""The model families that both backends compute alike: their configs and their tensors' names.

A checkpoint's config leaves out what equals its library's default, and its keys depend on the library's version.
`normalize_config` writes every setting of the forward pass under each key that a reader looks for, as transformers 5
understands the config (huggingface/transformers, models/*/configuration_*.py); a test compares them.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from common.models import gemma4, granite4, lfm2
from common.models.family_defaults import DEFAULTS
from common.models.rope_config import ROPES_BY_KIND, normalize_rope

# Architecture -> the model type of its text part. tests/parity compares the backends on each.
ARCHITECTURES = {
    "Exaone4ForCausalLM": "exaone4",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "Gemma4ForConditionalGeneration": "gemma4_text",
    "Gemma4UnifiedForCausalLM": "gemma4_unified_text",
    "Gemma4UnifiedForConditionalGeneration": "gemma4_unified_text",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "GraniteMoeHybridForCausalLM": granite4.KIND,
    "Lfm2ForCausalLM": lfm2.KIND,
    "LlamaForCausalLM": "llama",
    "Ministral3ForCausalLM": "ministral3",
    "Mistral3ForConditionalGeneration": "ministral3",  # or a Mistral: its text part says which
    "MistralForCausalLM": "mistral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2VLForConditionalGeneration": "qwen2",
    "Qwen2_5_VLForConditionalGeneration": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5_text",
    "Qwen3VLForConditionalGeneration": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
SUPPORTED = tuple(ARCHITECTURES)
# Their layers differ in kind.
_LISTED = ("exaone4", "gemma2", "gemma3_text", "olmo3", "qwen2", "qwen3", "qwen3_5_text", "smollm3")
_ALL_FULL = ("glm4", "granite", granite4.KIND, lfm2.KIND, "llama", "olmo2")  # no layer has a window
_PERIODS = {"gemma3_text": "sliding_window_pattern", "qwen3_5_text": "full_attention_interval"}
MULTIMODAL = frozenset(name for name in ARCHITECTURES if name.endswith("ForConditionalGeneration"))


def is_known(config: dict[str, Any]) -> bool:
    """Whether the backends compute this architecture by layers of their own; else by their libraries' (--try-model)."""
    return family(config) is not None


def is_multimodal(config: dict[str, Any]) -> bool:
    """Whether the language model is a part of this model. config: as in its file."""
    return (config.get("architectures") or [""])[0] in MULTIMODAL


def family(config: dict[str, Any]) -> str | None:
    """The model type of the language model, which may be a part of the model; None of an unknown architecture."""
    architecture, text = (config.get("architectures") or [""])[0], config.get("text_config")
    if architecture == "Mistral3ForConditionalGeneration" and isinstance(text, dict):
        return "mistral" if text.get("model_type", "mistral") == "mistral" else "ministral3"
    if architecture.startswith("Gemma4") and gemma4.has_experts(text if isinstance(text, dict) else config):
        return None
    kind = ARCHITECTURES.get(architecture)
    return None if kind == granite4.KIND and not granite4.is_dense(config) else kind


def architecture_alone(kind: str) -> str:
    """The architecture of a language model of this type that is not a part of another model."""
    return next(name for name, other in ARCHITECTURES.items() if other == kind and name not in MULTIMODAL)


@dataclass(frozen=True)
class ForwardConfig:
    """The settings of a forward pass outside of its layers."""

    embedding_scale: float
    logit_divisor: float
    logit_softcap: float | None
    windows: tuple[int | None, ...]  # each layer's sliding window in tokens; None: it attends to all before it
    ropes: tuple[dict[str, Any] | None, ...]  # each layer's RoPE parameters; None: it has no RoPE
    rope_split: int | None  # longrope: rows longer than this many tokens have other frequencies
    # queries are scaled by 1 + beta * ln(1 + floor(position / length)): (beta, length)
    query_scaling: tuple[float, int] | None = None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's normalized config: of a multimodal model, that of its text part."""
    config, kind = normalize_config(config), family(config)
    text, architecture = config.get("text_config", config), (config.get("architectures") or [""])[0]
    if kind is None or architecture not in MULTIMODAL:
        return {**text, "architectures": config.get("architectures")} if text is not config else config
    # a row without images has one position a token, where those of an image have three (mrope_section)
    ropes = {key: value for key, value in text["rope_parameters"].items() if not key.startswith("mrope")}
    return {**text, "architectures": [architecture_alone(kind)], "model_type": kind, "rope_parameters": ropes}


def context_length(config: dict[str, Any]) -> int:
    """The tokens that the model's positions were made for, RoPE scaling included; 0 where the config says nothing.

    config: normalized.
    """
    ropes = config.get("rope_parameters") or {}
    rope, longest = ropes.get("full_attention", ropes), config.get("max_position_embeddings")
    counted = config.get("model_type") == "gemma3_text" or rope.get("rope_type") == "llama3"  # the scaled ones, already
    factor = 1 if counted else rope.get("factor", 1)
    given = (longest, rope.get("original_max_position_embeddings", longest), factor)
    longest, original, factor = (value if isinstance(value, int | float) else 0 for value in given)
    return int(max(longest, original * factor))


def normalize_config(config: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
    """The config with every setting explicit, under the keys of both newer and older readers.

    transformers 5 nests RoPE under `rope_parameters`; readers that know only `rope_theta` and `rope_scaling` would
    silently take their default base. An unknown family gets no defaults. kind: of a text part, its family.
    """
    config = dict(config)
    kind = kind or family(config) or config.get("model_type")
    if isinstance(config.get("text_config"), dict):
        if kind not in DEFAULTS:
            both = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            text = normalize_config(config["text_config"] | both)
            return {**config, "vocab_size": text.get("vocab_size"), "text_config": text}
        given = config["text_config"].get("tie_word_embeddings", str(kind).startswith("gemma"))
        tied = config.get("tie_word_embeddings", given)
        text = {"model_type": kind, **config["text_config"], "tie_word_embeddings": tied}
        text = normalize_config(text, kind)
        # mlx-lm reads the vocabulary's size here
        return {**config, "tie_word_embeddings": tied, "vocab_size": text.get("vocab_size"), "text_config": text}
    if kind == granite4.KIND and not granite4.is_dense(config):
        kind = None
    if kind not in DEFAULTS:
        return normalize_rope(config, kind)  # the libraries read the rest as it is
    for key, value in DEFAULTS[kind].items():
        config.setdefault(key, value)
    if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is None and "num_attention_heads" in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    ends = config.get("eos_token_id")
    if isinstance(ends, list) and len(ends) == 1:
        config["eos_token_id"] = ends[0]
    if kind in gemma4.KINDS:
        return gemma4.normalize(config)
    if kind == granite4.KIND:
        config = granite4.normalize(config)
    if kind == lfm2.KIND:
        config = lfm2.normalize(config)
    _list_layers(config, kind)
    return normalize_rope(config, kind)


def _list_layers(config: dict[str, Any], kind: str) -> None:
    """Write what each layer is, under every key that a reader looks for."""
    if kind == "smollm3" and config.get("no_rope_layers") is None:
        every = config["no_rope_layer_interval"]
        config["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(config["num_hidden_layers"])]
    if kind in _LISTED and config.get("layer_types") is None:
        config["layer_types"] = [_layer_type(config, kind, i) for i in range(config["num_hidden_layers"])]
    if kind == "exaone4":  # mlx-lm reads no layer_types
        letters = "".join("L" if one == "sliding_attention" else "G" for one in config["layer_types"])
        config["sliding_window_pattern"] = letters if config["sliding_window"] is not None else None
    if kind in _PERIODS and "full_attention" in config["layer_types"]:  # mlx-lm reads nothing else
        config[_PERIODS[kind]] = config["layer_types"].index("full_attention") + 1


def _layer_type(config: dict[str, Any], kind: str, layer: int) -> str:
    if kind == "qwen3_5_text":
        return "linear_attention" if (layer + 1) % config.get("full_attention_interval", 4) else "full_attention"
    return "sliding_attention" if _slides(config, kind, layer) else "full_attention"


def _slides(config: dict[str, Any], kind: str, layer: int) -> bool:
    if kind.startswith("gemma"):
        every = 2 if kind == "gemma2" else config.get("sliding_window_pattern") or 6
        return (layer + 1) % every != 0
    if kind == "olmo3":
        return (layer + 1) % 4 != 0
    if kind == "exaone4":  # "LLLG", or how many layers there are from one that does not to the next
        pattern = config["sliding_window_pattern"] or 4 if config["sliding_window"] is not None else 1
        local = pattern[layer % len(pattern)] == "L" if isinstance(pattern, str) else (layer + 1) % pattern != 0
        return bool(local)
    windowed = config["use_sliding_window"] and config["sliding_window"] is not None
    if kind == "smollm3":
        return bool(windowed and not config["no_rope_layers"][layer])
    return bool(windowed and layer >= config["max_window_layers"])


def forward_config(config: dict[str, Any]) -> ForwardConfig:
    """What a normalized text config says of the forward pass; of an unknown family nothing, and nobody asks."""
    if not is_known(config):
        return ForwardConfig(1.0, 1.0, None, (), (), None)
    kind, layers = config["model_type"], range(config["num_hidden_layers"])
    rope, window = config["rope_parameters"], config.get("sliding_window")
    kinds = config.get("layer_types") or []
    windows: list[int | None] = [None for _ in layers]
    if kind in ("ministral3", "mistral", "phi3"):  # they do not read layer_types
        windows = [window for _ in layers]
    elif kind not in _ALL_FULL and config.get("use_sliding_window", True):
        windows = [window if kinds[i] == "sliding_attention" else None for i in layers]
    if kind in (*ROPES_BY_KIND, *gemma4.KINDS):
        ropes = [rope[kinds[i]] for i in layers]
    else:
        rotated = [1] * len(layers)
        if kind in ("qwen3_5_text", lfm2.KIND):
            rotated = [one == "full_attention" for one in kinds]
        elif kind == "exaone4" and window is not None:
            rotated = [one == "sliding_attention" for one in kinds]
        elif config.get("position_embedding_type") == "nope":  # a Granite 4
            rotated = [False] * len(layers)
        ropes = [rope if config.get("no_rope_layers", rotated)[i] else None for i in layers]
    gemma = kind.startswith("gemma")
    scaling = (rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
    return ForwardConfig(
        embedding_scale=config["hidden_size"] ** 0.5 if gemma else config.get("embedding_multiplier", 1.0),
        logit_divisor=config.get("logits_scaling", 1.0),
        logit_softcap=config.get("final_logit_softcapping") if gemma else None,
        windows=tuple(windows),
        ropes=tuple(ropes),
        rope_split=rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None,
        query_scaling=scaling if kind == "ministral3" else None,
    )


# A layer of a language model of any architecture: not those of the towers for images and sound.
LANGUAGE_LAYER = re.compile(r"(?!.*(?:vision|visual|audio))(?:\w+\.)*layers\.(\d{1,9})\.(.+)")
# Of a model besides its language model: towers for images and sound, and layers that predict several tokens at once.
OTHER_PARTS = re.compile(
    r"(?:model\.)?(mtp|vision_\w+|visual|audio_\w+|multi_modal_projector|embed_vision|embed_audio)\."
)
# A multimodal model's tensors besides its language model, by today's names without the leading "model.".
VISION_PARTS = (
    *("vision_tower.", "multi_modal_projector.", "visual."),
    *("embed_vision.", "vision_embedder.", "audio_tower.", "embed_audio."),  # Gemma 4's
)


def hf_name(name: str) -> str:
    """A tensor's or module's name in today's layout; before transformers 4.52 multimodal models had another nesting."""
    if name.startswith("language_model."):
        return name.replace("language_model.model.", "model.language_model.", 1).replace(
            "language_model.lm_head", "lm_head"
        )
    return name


def text_name(name: str) -> str:
    """The name within the language model, as the backends load it: `model.layers.0 ...` in every family."""
    return hf_name(name).replace("model.language_model.", "model.", 1)


def language_tensor(name: str, tied: bool) -> bool:
    """Whether the tensor with this text_name belongs to the language model, and is not a copy of another."""
    return (
        name.startswith(("model.", "lm_head."))
        and not name.removeprefix("model.").startswith(VISION_PARTS)
        and not (tied and name.startswith("lm_head."))
        and not name.endswith("rotary_emb.inv_freq")
    )


def mlx_name(name: str) -> str:
    """The name within mlx-lm's model, which keeps the older nesting of multimodal models."""
    return name.replace("model.language_model.", "language_model.model.", 1)


def mlx_type(kind: str) -> str:
    """The model type by which mlx-lm knows a language model that was saved alone."""
    if kind == "gemma4_unified_text":
        return "gemma4_text"
    alone = kind.endswith("_text") and find_spec(f"mlx_lm.models.{kind}") is None
    return kind.removesuffix("_text") if alone else kind

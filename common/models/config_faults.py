"""What a config asks for that the two backends would compute differently, or not at all."""

from typing import Any

from common.models import gemma4, granite4, lfm2
from common.models.config_kinds import LAYER_TYPES
from common.models.families import MULTIMODAL, SUPPORTED, family, is_known, text_config
from common.models.family_defaults import DEFAULTS

_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_PLAIN_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # of an architecture that is tried
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_PADDING = {"glm4": 151329, "phi3": 32000}  # transformers' pad_token_id where the config has none
_LAYER_TYPES = {
    "qwen3_5_text": ("full_attention", "linear_attention"),
    granite4.KIND: ("attention",),
    lfm2.KIND: ("full_attention", lfm2.CONVOLUTION),
}
_PARTLY_ROTATED = ("glm4", "phi3", "qwen3_5_text")
_NO_HEAD_DIM = ("qwen2", "phi3", "granite", granite4.KIND, lfm2.KIND)
_ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def config_faults(config: dict[str, Any]) -> list[str]:
    """What the two backends would compute differently, or not at all: a line each.

    config: not yet normalized, without `config_kinds.kind_faults`.
    """
    kind = family(config)
    if kind is None:
        text = config.get("text_config") or config
        absent = [key for key in _PLAIN_SIZES if text.get(key) is None]
        return [f"its config.json lacks {', '.join(absent)}"] if absent else []
    architecture = config["architectures"][0]
    # until transformers 4.52 Qwen's multimodal configs held the text part's settings themselves
    given = config.get("text_config") or config if architecture in MULTIMODAL else config
    sizes = {key: given.get(key, DEFAULTS[kind].get(key)) for key in _SIZES}
    if absent := [key for key, size in sizes.items() if size is None]:
        return [f"its config.json lacks {', '.join(absent)}"]
    letters = kind == "exaone4" and {*str(given.get("sliding_window_pattern") or "G")} <= {"L", "G"}
    if given.get("sliding_window") == 0 or (isinstance(given.get("sliding_window_pattern"), str) and not letters):
        return ["its sliding_window or sliding_window_pattern is not a whole number from 1"]
    text, faults = text_config(config), []
    own = (kind, f"{config.get('model_type')}_text", config.get("model_type"))
    if given is not config and given.get("model_type", kind) not in own:
        return [f"the model_type of its text part, {given['model_type']}, is not {architecture}'s"]
    if text.get("model_type") != kind:
        faults.append(f"its model_type {text.get('model_type')} is not {architecture}'s, {kind}")
    heads, keys = text["num_attention_heads"], text["num_key_value_heads"]
    if not text["head_dim"] or heads % keys:
        faults.append(f"its {heads} attention heads do not fit hidden_size or its {keys} key heads")
    known = _LAYER_TYPES.get(kind, LAYER_TYPES)
    if strange := {*(text.get("layer_types") or [])} - {*known}:
        faults.append(f"its layer_types name {min(strange)}, and can name {' and '.join(known)}")
        return faults
    if kind == "qwen3_5_text":
        faults += _delta_faults(text)
    faults += gemma4.faults(text, given) if kind in gemma4.KINDS else _rope_faults(text, kind)
    padding = text.get("pad_token_id", _PADDING.get(kind))
    if isinstance(padding, int) and padding >= text["vocab_size"]:
        faults.append(f"its pad_token_id {padding} is beyond its vocabulary of {text['vocab_size']}")
    wanted = "gelu_pytorch_tanh" if kind.startswith("gemma") else "silu"
    activation = text.get("hidden_activation" if kind.startswith("gemma") else "hidden_act", wanted)
    if activation != wanted:
        faults.append(f"its activation {activation} is not the family's own, {wanted}")
    return faults + _attention_faults(text, kind) + _other_faults(text, kind)


def unsupported(config: dict[str, Any]) -> list[str]:
    """Says that the architecture has no layers of the backends' own, where it has none."""
    if is_known(config):
        return []
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture in SUPPORTED:
        also = "Mamba layers and " if architecture.startswith("Granite") else ""
        return [f"the {also}mixtures of experts in this {architecture} are not supported; its dense models are"]
    return [f"its architecture {architecture} is not supported; supported: {', '.join(SUPPORTED)}"]


def _rope_faults(text: dict[str, Any], kind: str) -> list[str]:
    ropes, faults = text["rope_parameters"], []
    if kind == "ministral3" and (ropes["rope_type"] != "yarn" or ropes.get("llama_4_scaling_beta") is None):
        return ["its RoPE scaling is not 'yarn' with a llama_4_scaling_beta, which a Ministral 3 has"]
    for rope in ropes.values() if "full_attention" in ropes else [ropes]:
        if rope["rope_type"] not in _ROPES or (rope["rope_type"] == "longrope") > (kind == "phi3"):
            faults.append(f"its RoPE scaling {rope['rope_type']!r} is not computed alike by both backends")
        elif absent := [key for key in _ROPE_NEEDS.get(rope["rope_type"], ()) if rope.get(key) is None]:
            faults.append(f"its RoPE scaling {rope['rope_type']!r} lacks {', '.join(absent)}")
        elif rope["rope_type"] == "longrope":
            needed = int(text["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
            counts = {key: len(rope[key]) for key in ("short_factor", "long_factor")}
            faults += [f"its {key} has {n} numbers and needs {needed}" for key, n in counts.items() if n != needed]
        if "full_attention" in ropes and not rope.get("truncate", True):  # transformers looks for it outside of them
            faults.append("the truncate of its RoPE is not computed alike by both backends")
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and kind not in _PARTLY_ROTATED:
            faults.append("its partial_rotary_factor is not computed by both backends")
    return faults


def _delta_faults(text: dict[str, Any]) -> list[str]:
    """Of a model with gated delta nets."""
    faults, heads, keys = [], text["linear_num_value_heads"], text["linear_num_key_heads"]
    if heads % keys:
        faults.append(f"its {heads} heads of values in linear attention do not fit its {keys} heads of keys")
    if text.get("attn_output_gate") is False:
        faults.append("its attention has no gate (attn_output_gate), which both libraries compute all the same")
    full = [kind == "full_attention" for kind in text["layer_types"]]
    every = full.index(True) + 1 if any(full) else 0
    regular = every and full == [(layer + 1) % every == 0 for layer in range(len(full))]
    if not regular:
        faults.append("its layer_types do not repeat one order that ends in full_attention, as mlx-lm wants it")
    return faults


def _other_faults(text: dict[str, Any], kind: str) -> list[str]:
    if kind == "gemma2" and not (text["attn_logit_softcapping"] and text["tie_word_embeddings"]):
        return ["a Gemma 2 with attention that is not capped, or embeddings that are not tied, is not a Gemma 2"]
    if kind == "glm4" and text["tie_word_embeddings"]:
        return ["its embeddings are tied, which mlx-lm does not compute for a GLM-4"]
    if kind == lfm2.KIND and not text["tie_word_embeddings"]:
        return ["its embeddings are not tied, which mlx-lm does not compute for an LFM2"]
    if kind == lfm2.KIND and len({*text["layer_types"]}) == 1:
        return ["its layers are all of one kind, which mlx-lm does not compute for an LFM2"]
    return []


def _attention_faults(text: dict[str, Any], kind: str) -> list[str]:
    faults = []
    if kind in ("qwen3", "gemma2", "gemma3_text") and text["attention_bias"]:
        faults.append("its attention has biases, which the MLX backend does not compute for this family")
    if kind in _NO_HEAD_DIM and text["head_dim"] * text["num_attention_heads"] != text["hidden_size"]:
        faults.append(f"its head_dim {text['head_dim']} is not hidden_size / num_attention_heads")
    ahead = text.get("use_bidirectional_attention")
    if ahead and not (kind in gemma4.KINDS and ahead == "vision"):  # which text rows do not have
        faults.append("its attention looks ahead (use_bidirectional_attention)")
    if kind == "gemma3_text" and text["attn_logit_softcapping"]:
        faults.append("its capped attention (attn_logit_softcapping) is not computed by both backends")
    return faults

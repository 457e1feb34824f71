"""What llama.cpp's converter would turn into another model, or cannot turn into one: refused before training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.models import gemma4, granite4, lfm2, sentencepiece
from common.models.config_kinds import LAYER_TYPES
from common.models.families import context_length, forward_config, is_known
from common.models.model_folder import ModelFolder
from common.models.rope_config import unrounded_yarn, yarn_ratio, yarn_scale

_NO_OPTIONS = ("exaone4", "olmo2", "olmo3")  # llama.cpp knows their attention in one form only
_LAYERS_OF_EXAONE_32B = 64  # by their number llama.cpp tells it from the others
# What llama.cpp scales RoPE by, where not as most do. Converters that are no kind of Llama's drop the factors of a
# `llama3`. Granite's fails on them, and SmolLM3's writes what llama.cpp does not take.
_SCALINGS = {
    **dict.fromkeys(gemma4.KINDS, ("default", "proportional")),
    "phi3": ("default", "longrope"),
}
_MOST_SCALINGS = ("default", "linear", "yarn")
_LLAMA3 = ("apertus", "arcee", "exaone4", "exaone_moe", "llama", "mistral", "mixtral")
# Whether llama.cpp divides the weights of a token's experts by their sum. That is transformers' default too, except for
# qwen3_moe, whose published configs ask for it.
_NORMALIZED = {
    **dict.fromkeys(("lfm2_moe", "mellum", "qwen3_moe", "qwen3_next"), True),
    **dict.fromkeys(("olmoe", "qwen2_moe"), False),
}
_ROUNDED = "llama.cpp rounds the range over which YaRN blends, and this model does not (truncate)"
_WINDOWS = ("exaone4", "gemma2", "gemma3_text", *gemma4.KINDS, "olmo3")  # of which llama.cpp computes them
# For these the converter fails without `tokenizer.model`, or takes `tokenizer.json` and gets other ids.
_NEED_SENTENCEPIECE = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text")


def check_convertible(folder: Path, tokenizer: Any | None = None, texts: Sequence[str] = ()) -> None:
    """UserError where the converter would make another model, or another tokenizer.

    That is so where it needs a `tokenizer.model`, and the folder has none and none can be made from it. Called before
    training: the remedy may take a download. The file that would be made is checked on `texts` too.
    tokenizer: the folder's, where it is loaded already.
    """
    model = ModelFolder(folder)
    kind = model.model_type
    if fault := other_model(model) or (_other_glm4(folder) if kind == "glm4" else ""):
        raise UserError(f"{folder}: {fault}.", "Use --export fused.")
    if (folder / sentencepiece.NAME).is_file():
        return
    if sentencepiece.rebuild_checked(folder, tokenizer, texts) is None and kind in _NEED_SENTENCEPIECE:
        raise UserError(
            f"{folder} has no tokenizer.model, and llama.cpp cannot convert a {kind} tokenizer correctly without it.",
            sentencepiece.REMEDY,
        )


def lost_window(config: dict[str, Any]) -> int | None:
    """The sliding window of a known family that llama.cpp would not compute; None where no row exceeds it."""
    windows = {window for window in forward_config(config).windows if window is not None}
    lost = config["model_type"] not in _WINDOWS and windows and min(windows) < context_length(config)
    return min(windows) if lost else None


def other_model(model: ModelFolder) -> str:
    """What of the model llama.cpp 0.3.36 would compute otherwise, or not at all; empty where nothing is known."""
    config, known = model.config, is_known(model.written_config)
    rope = config.get("rope_parameters") or {}
    ropes = [rope[name] for name in LAYER_TYPES if name in rope] or [rope]
    if fault := _lost_scaling(config, known):
        return fault
    if not known:
        return next((_ROUNDED for one in ropes if unrounded_yarn(one)), "") or _other_router(config)
    kind, layers = config["model_type"], config["num_hidden_layers"]
    if kind == "smollm3" and config["no_rope_layers"] != [int((layer + 1) % 4 != 0) for layer in range(layers)]:
        return "llama.cpp leaves RoPE out of every fourth layer of a SmolLM3, and this model out of others"
    if kind == "exaone4" and (config["sliding_window"] is not None) != (layers == _LAYERS_OF_EXAONE_32B):
        return "llama.cpp knows windows in an EXAONE 4 of 64 layers, and in no other"
    if kind == "ministral3" and config["sliding_window"] is not None:
        return "llama.cpp knows no windows in a Ministral 3"
    if found := [fault for one in ropes if one["rope_type"] == "yarn" and (fault := _other_yarn(one, kind))]:
        return found[0]
    if kind in gemma4.KINDS:
        return _other_gemma4(model)
    if kind == lfm2.KIND and config["conv_bias"]:
        return "llama.cpp has no biases in the convolutions of an LFM2"
    if kind == granite4.KIND and config["position_embedding_type"] != "rope":
        return "llama.cpp rotates queries and keys of every Granite 4 without Mamba layers, and this model does not"
    return _other_attention(config, kind) if kind in _NO_OPTIONS else ""


def _lost_scaling(config: dict[str, Any], known: bool) -> str:
    """The same of the RoPE scaling. Of an architecture that is not known: of the one that most converters drop."""
    kind, rope = str(config.get("model_type")), config.get("rope_parameters") or {}
    ropes = [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]
    named = {str(one.get("rope_type", "default")) for one in ropes}
    taken = (*_SCALINGS.get(kind, _MOST_SCALINGS), *(["llama3"] if kind in _LLAMA3 else []))
    lost = {name for name in named - {*taken} if known or name == "llama3"}
    return f"llama.cpp does not know the RoPE scaling {min(lost)!r} in a model of type {kind}" if lost else ""


def _other_router(config: dict[str, Any]) -> str:
    """The same of a mixture's router. llama.cpp reads no norm_topk_prob."""
    kind = str(config.get("model_type"))
    normalized = config.get("norm_topk_prob", kind != "qwen3_moe" and _NORMALIZED.get(kind))
    if kind not in _NORMALIZED or bool(normalized) == _NORMALIZED[kind]:
        return ""
    does, model = ("lets", "does not") if _NORMALIZED[kind] else ("does not let", "does")
    return f"llama.cpp {does} the chosen experts of a {kind} weigh 1 together, and this model {model} (norm_topk_prob)"


def _other_yarn(rope: dict[str, Any], kind: str) -> str:
    """The same of YaRN. Of what scales its attention and of its betas llama.cpp reads a Ministral 3's alone."""
    under = rope.get("mscale_all_dim") if kind == "ministral3" else 0
    if under is None:
        return "llama.cpp's converter needs mscale_all_dim in a Ministral 3's RoPE"
    if (scale := yarn_scale(rope)) and not math.isclose(scale, yarn_ratio(rope, 1, under), rel_tol=1e-6):
        return "llama.cpp does not read how far this YaRN scales"
    if not rope.get("factor"):
        return "llama.cpp's converter drops a YaRN that states no factor"
    if unrounded_yarn(rope):
        return _ROUNDED
    if kind != "ministral3" and (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        return "llama.cpp knows YaRN with a beta_fast of 32 and a beta_slow of 1, and this model has others"
    return ""


def _other_glm4(folder: Path) -> str:
    """What a GLM-4's tokenizer lacks for llama.cpp's converter; empty where nothing."""
    added = read_json(folder / "tokenizer.json", "Fetch the model's files again.").get("added_tokens")
    names = {token.get("content") for token in added or [] if isinstance(token, dict)}
    absent = [name for name in ("<|endoftext|>", "<|user|>") if name not in names]
    return f"llama.cpp's converter wants the token {absent[0]} in a GLM-4's tokenizer" if absent else ""


def _other_gemma4(model: ModelFolder) -> str:
    """The same of a Gemma 4."""
    config = model.config
    kinds, first = config["layer_types"], config["num_hidden_layers"] - config["num_kv_shared_layers"]
    if not config["final_logit_softcapping"]:
        return "llama.cpp caps the logits of every Gemma 4, and this model does not"
    if first < len(kinds) and kinds[first - 2 : first] != ["sliding_attention", "full_attention"]:
        return "llama.cpp shares the keys of a sliding layer and of the full one behind it, and this model of others"
    if model.written_config["architectures"][0] == "Gemma4UnifiedForCausalLM":
        return "llama.cpp's converter knows the text part of a Gemma4Unified as a part of it only"
    return ""


def _other_attention(config: dict[str, Any], kind: str) -> str:
    """The same of an attention of which llama.cpp knows one form."""
    if config.get("attention_bias"):
        return f"llama.cpp has no biases in the attention of {kind}"
    if kind.startswith("olmo") and config["tie_word_embeddings"]:
        return f"llama.cpp does not tie the embeddings of {kind}"
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return f"llama.cpp wants the heads of {kind} to be together as wide as the model"
    return ""

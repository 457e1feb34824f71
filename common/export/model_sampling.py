"""How the exported model's next token is to be drawn: as its authors recommend, for the mode that was trained.

The base's generation_config.json comes first. It may lack settings that the authors name elsewhere, as a model out of a
GGUF does. And of a model that can reason it holds those for reasoning, which do not suit one that is trained without.
"""

from typing import Any, Literal

Thinking = Literal["off", "keep"]
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MOST = 100_000  # above it nothing is a setting

_GEMMA = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
_SMOLLM_3 = {"temperature": 0.6, "top_p": 0.95}
_QWEN_OFF = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
# By model type and --thinking. Sources: the model cards of Qwen3-0.6B, Qwen3.5-35B-A3B, SmolLM3-3B and Gemma 4;
# generation_config.json of gemma-3-1b-it, in which no temperature means 1. Llama's type is that of SmolLM2 and many
# others too, so it has none here: what its folder says counts.
_FAMILIES: dict[str, dict[Thinking, dict[str, float]]] = {
    "gemma3_text": {"off": _GEMMA, "keep": _GEMMA},
    "gemma4_text": {"off": _GEMMA, "keep": _GEMMA},
    "gemma4_unified_text": {"off": _GEMMA, "keep": _GEMMA},
    "qwen3": {"off": _QWEN_OFF, "keep": {"temperature": 0.6, "top_k": 20, "top_p": 0.95}},
    "qwen3_5_text": {"off": _QWEN_OFF, "keep": {"temperature": 1.0, "top_k": 20, "top_p": 0.95}},
    "smollm3": {"off": _SMOLLM_3, "keep": _SMOLLM_3},
}


def export_sampling(generation: dict[str, Any], kind: str, thinking: Thinking) -> dict[str, float]:
    """The settings that are known. generation: the base's generation_config.json; kind: its model type."""
    own, family = settings_in(generation), _FAMILIES.get(kind, {})
    if thinking == "off" and own and own == family.get("keep"):
        own = {}
    return {**family.get(thinking, {}), **own}


def settings_in(generation: dict[str, Any]) -> dict[str, float]:
    """Those above 0 that are numbers: a stranger's file may hold anything, and 0 is greedy, or means no limit."""
    numbers = {name: generation[name] for name in _SETTINGS if type(generation.get(name)) in (int, float)}
    return {
        name: value
        for name, value in numbers.items()
        if 0 < value < _MOST and (name != "top_k" or isinstance(value, int))
    }

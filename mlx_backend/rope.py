"""Rotary embedding frequencies as transformers 5 computes them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rope:
    """Frequencies: `inverse` for rows of up to `split` tokens, `inverse_long` for longer ones. `factor` scales both."""

    inverse: np.ndarray  # [rotated / 2] float64, radians a position
    inverse_long: np.ndarray
    factor: float
    split: int | None


def rope(parameters: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    """The frequencies for a layer's normalized `rope_parameters` (huggingface/transformers, modeling_rope_utils.py)."""
    kind, base = parameters["rope_type"], float(parameters["rope_theta"])
    width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    plain = 1.0 / base ** (np.arange(0, width, 2) / width)
    original: Any = parameters.get("original_max_position_embeddings")
    if kind == "longrope":
        ratio = parameters.get("factor") or max_positions / original
        factor = parameters.get("attention_factor")
        if factor is None:
            factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        short, long = (np.array(parameters[f"{name}_factor"]) for name in ("short", "long"))
        return Rope(plain / short, plain / long, factor, original)
    inverse, factor = plain, 1.0
    if kind == "proportional":  # Gemma 4's: the first pairs of the complete head, and 0 for the others
        turned = int(width // 2)
        inverse = np.zeros(head_dim // 2)
        inverse[:turned] = 1.0 / base ** (np.arange(0, 2 * turned, 2) / head_dim)
    elif kind == "linear":
        inverse = plain / parameters["factor"]
    elif kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # of each frequency within the original context
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        inverse = (1 - smooth) * plain / parameters["factor"] + smooth * plain
    elif kind == "yarn":
        inverse, factor = _yarn(parameters, plain, width, base, max_positions / original)
    return Rope(inverse, inverse, factor, None)


def _yarn(p: dict[str, Any], plain: np.ndarray, width: int, base: float, ratio: float) -> tuple[np.ndarray, float]:
    """`(frequencies, factor)` of YaRN (Peng et al. 2023, arXiv:2309.00071)."""
    ratio = p.get("factor") or ratio

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(ratio) + 1 if ratio > 1 else 1.0

    def dimension(turns: float) -> float:
        return width * math.log(p["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    factor = p.get("attention_factor")
    if factor is None:
        both = p.get("mscale") and p.get("mscale_all_dim")
        factor = magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"]) if both else magnitude(1)
    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)
    return plain / ratio * ramp + plain * (1 - ramp), factor

"""Attention over rows of unequal length that lie end to end: padding exists inside it only, nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

NAME = "twintune"  # as transformers knows `attend`; for a name it knows no mask for, it makes none


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a micro-batch, end to end, stand among its padded positions [B, T]."""

    count: int
    width: int
    places: torch.Tensor | None  # [tokens] int64; None: all rows are as long, nothing is padded
    bounds: torch.Tensor | None = None  # [B + 1] int32, where a row begins: for a kernel that reads rows end to end
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, tokens, d] -> [B, heads, T, d], zeros where a row has ended."""
        flat = x[0].transpose(0, 1)
        if self.places is not None:
            zeros = flat.new_zeros(self.count * self.width, *flat.shape[1:])
            flat = zeros.index_copy(0, self.places, flat)
        return flat.reshape(self.count, self.width, *flat.shape[1:]).transpose(1, 2)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, d] -> [1, tokens, heads, d]."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return (flat if self.places is None else flat.index_select(0, self.places))[None]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    rows: Rows | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in a layer: query [1, heads, tokens, d], key and value with fewer heads; causal.

    Rows are right-padded, so no real token sees padding. Without `rows` the tokens are one row. Where there are more
    keys than queries, the one query is the row's newest token: it sees all keys, or those within its window.
    """
    if rows is not None and rows.bounds is not None:
        return _flash(query, key, value, scaling, rows, sliding_window), None
    if rows is not None:
        query, key, value = rows.spread(query), rows.spread(key), rows.spread(value)
    length = query.shape[2]
    if key.shape[2] > length:
        if length != 1:
            raise AssertionError(f"{length} tokens at once after cached ones: their mask is not made here")
        if sliding_window is not None:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    windowed = sliding_window is not None and sliding_window < length
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and (softcap is not None or (query.is_cuda and length > 1)):
        # on a GPU no kernel but flash's takes fewer key heads: torch would write all scores out
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap is None and not windowed:
        result = functional.scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        mask = _mask(length, sliding_window if windowed else None, query, rows)
        if softcap is None:
            result = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
        else:  # Gemma 2: torch has no kernel that caps the scores
            scores = ((query @ key.mT) * (scaling / softcap)).tanh() * softcap + mask
            result = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return (result.transpose(1, 2) if rows is None else rows.gather(result)), None


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Without waiting for the device: from pinned memory where there is one to copy from."""
    tensor = torch.from_numpy(array).to(dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_flash(device: torch.device) -> bool:
    """Whether this machine has the kernel of `packs_attention`: a GPU from Ampere on, and torch built for it."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def bounds(lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """For `Rows.bounds`."""
    return to_device(np.concatenate([[0], np.cumsum(lengths)]), device, torch.int32)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, rows: Rows, window: int | None
) -> torch.Tensor:
    """[1, heads, tokens, d] -> [1, tokens, heads, d]: no padding and no mask (Dao 2023, FlashAttention-2)."""
    from torch.nn.attention.varlen import varlen_attn

    flat = [x[0].transpose(0, 1) for x in (query, key, value)]
    return varlen_attn(
        *flat,
        rows.bounds,
        rows.bounds,
        rows.width,
        rows.width,
        scale=scaling,
        window_size=((window or 0) - 1, 0),  # of a window the token itself is one; -1: all that is behind
        enable_gqa=query.shape[1] != key.shape[1],
    )[None]


def _mask(length: int, window: int | None, query: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """[T, T]: 0 where a query (first axis) may see a key, else minus infinity; made once for all layers of a batch."""
    kept = {} if rows is None else rows.masks
    if window not in kept:
        places = torch.arange(length, device=query.device)
        behind = places[:, None] - places
        seen = (behind >= 0) & (behind < window) if window else behind >= 0
        kept[window] = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
    return kept[window]


def register() -> str:
    from transformers import AttentionInterface

    function: Callable[..., Any] = attend
    AttentionInterface.register(NAME, function)
    return NAME

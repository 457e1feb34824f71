"""Attention over packed rows of unequal length: padding exists inside it only, nowhere else."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

_aten = torch.ops.aten
NAME = "twintune"  # under which transformers finds `attend`; it makes masks only for names that it knows


@dataclass(frozen=True)
class RaggedRows:
    """Where the packed tokens of a micro-batch belong among its padded positions [B, T]."""

    count: int  # B
    width: int  # T
    indices: torch.Tensor | None  # [tokens] int64; None: all rows have the same length, nothing is padded
    cu_seqlens: torch.Tensor | None = None  # [B + 1] int32, where each row begins: for a kernel that reads packed rows
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window, made once for all layers

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[1, heads, tokens, d] -> [B, heads, T, d], zeros after the end of a row."""
        flat = x[0].transpose(0, 1)
        if self.indices is not None:
            zeros = flat.new_zeros(self.count * self.width, *flat.shape[1:])
            flat = zeros.index_copy(0, self.indices, flat)
        return flat.reshape(self.count, self.width, *flat.shape[1:]).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[B, heads, T, d] -> [1, tokens, heads, d]."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return (flat if self.indices is None else flat.index_select(0, self.indices))[None]


def attend(  # noqa: PLR0913  # as transformers calls it
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    rows: RaggedRows | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention [1, tokens, heads, d] of query [1, heads, tokens, d]; key and value may have fewer heads.

    transformers calls it in every layer, and dictates the signature. Rows are padded on the right, so no real token
    sees padding. Without `rows` the tokens are one row. Where there are more keys than queries, the one query is the
    row's newest token: it sees all keys, or those within its window.
    """
    if rows is not None and rows.cu_seqlens is not None:
        return _flash(query, key, value, scaling, rows, sliding_window), None
    if rows is not None:
        query, key, value = rows.pad(query), rows.pad(key), rows.pad(value)
    length = query.shape[2]
    if key.shape[2] > length:
        if length != 1:
            raise AssertionError(f"{length} tokens at once after cached ones: their mask is not made here")
        if sliding_window is not None:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    windowed = sliding_window is not None and sliding_window < length
    mask = None
    if softcap is not None or windowed:
        mask = _mask(length, sliding_window if windowed else None, query, rows)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and (softcap is not None or (query.is_cuda and length > 1)):
        # on a GPU only the flash kernel takes fewer key heads; without it torch would write all scores out
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if softcap is None:
        causal, grouped = mask is None and length > 1, query.shape[1] != key.shape[1]
        if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
            result = CpuAttention.apply(query, key, value, mask, causal, scaling)
        else:
            result = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
    else:  # Gemma 2: torch has no kernel that caps the scores
        scores = ((query @ key.mT) * (scaling / softcap)).tanh() * softcap + mask
        result = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return (result.transpose(1, 2) if rows is None else rows.unpad(result)), None


class CpuAttention(torch.autograd.Function):
    """torch's flash attention on a CPU in bf16, with its backward pass in float32.

    In bf16 that pass takes three times as long: 18 ms instead of 6 for 4 rows of 160 tokens with SmolLM2's 9 heads, on
    a core of an Intel Xeon with amx_bf16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scaling: float,
    ) -> torch.Tensor:
        result, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
        )
        ctx.save_for_backward(query, key, value, result, sums, mask)
        ctx.causal, ctx.scaling = causal, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, sums, mask = ctx.saved_tensors
        exact = [x.float() for x in (outputs[0], query, key, value, result)]
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *exact, sums, 0.0, ctx.causal, attn_mask=None if mask is None else mask.float(), scale=ctx.scaling
        )
        return *(grad.to(query.dtype) for grad in grads), None, None, None


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The array as a tensor on the device; from pinned memory on CUDA, so that nothing waits for the copy.

    Not on MPS, which may copy after the array is gone (PyTorch's issue 189690).
    """
    tensor = torch.from_numpy(array).to(dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_flash(device: torch.device) -> bool:
    """Whether this machine has the kernel of `packs_attention`: a GPU from Ampere on, and torch built for it."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cu_seqlens(lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """Where each row of these lengths begins, and the end of the last: int32 [B + 1]."""
    return to_device(np.concatenate([[0], np.cumsum(lengths)]), device, torch.int32)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, rows: RaggedRows, window: int | None
) -> torch.Tensor:
    """[1, heads, tokens, d] -> [1, tokens, heads, d], without padding or mask (Dao 2023, FlashAttention-2)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and _asks_for_groups(varlen_attn):
        options["enable_gqa"] = True
    flat = [x[0].transpose(0, 1) for x in (query, key, value)]
    return varlen_attn(
        *flat,
        rows.cu_seqlens,
        rows.cu_seqlens,
        rows.width,
        rows.width,
        scale=scaling,
        window_size=((window or 0) - 1, 0),  # tokens before and after; the token itself counts to a window; -1: all
        **options,
    )[None]


@cache
def _asks_for_groups(kernel: Callable[..., torch.Tensor]) -> bool:
    """Whether it must be told of fewer key heads; torch 2.11's computes with them without a word."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _mask(length: int, window: int | None, query: torch.Tensor, rows: RaggedRows | None) -> torch.Tensor:
    """[T, T]: 0 where a query (first axis) may see a key, else minus infinity."""
    masks = {} if rows is None else rows.masks
    if window not in masks:
        positions = torch.arange(length, device=query.device)
        distance = positions[:, None] - positions
        seen = (distance >= 0) & (distance < window) if window else distance >= 0
        masks[window] = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
    return masks[window]


def register() -> str:
    """The name under which transformers now knows `attend`."""
    from transformers import AttentionInterface

    function: Callable[..., Any] = attend
    AttentionInterface.register(NAME, function)
    return NAME

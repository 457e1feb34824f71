"""Gated delta nets (Qwen3.5) and short convolutions (LFM2) over packed rows; the rest is transformers'."""

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from torch_backend.attention import RaggedRows
from torch_backend.gated_delta import GatedDelta, gated_delta
from torch_backend.norm import RMSNorm

_EPSILON = 1e-6  # of the length of queries and keys


def install_linear_attention(model: Any) -> None:
    """Have the gated delta nets and convolutions of `model` know rows, and compute by this package alone."""
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            module = layer.linear_attn
            module.forward = partial(_mix, module)
        elif hasattr(layer, "conv"):
            layer.conv.forward = partial(_convolve, layer.conv)


def _mix(
    module: Any, hidden_states: torch.Tensor, cache: Any = None, rows: RaggedRows | None = None, **_: Any
) -> torch.Tensor:
    """The output [1, tokens, hidden] for hidden_states of that shape. cache: transformers', while generating.

    A row begins with a state of zeros, and nothing before it; it is padded on the right, where no real token looks.
    """
    rows = rows or RaggedRows(1, hidden_states.shape[1], None)
    mixed, a, b = (
        rows.pad(project(hidden_states)[:, None])[:, 0]
        for project in (module.in_proj_qkv, module.in_proj_a, module.in_proj_b)
    )
    number = module.layer_idx
    convolved = functional.silu(_convolved(mixed, module.conv1d, cache, number))
    queries, keys, values = convolved.split([module.key_dim, module.key_dim, module.value_dim], -1)
    queries, keys = (_heads(part, module.head_k_dim) for part in (queries, keys))
    decay = -module.A_log.float().exp() * functional.softplus(a.float() + module.dt_bias)
    parts = (
        _scaled(queries, 1 / module.head_k_dim),
        _scaled(keys, module.head_k_dim**-0.5),
        _heads(values, module.head_v_dim),
        decay.transpose(1, 2),
        b.sigmoid().transpose(1, 2),
    )
    if cache is None:
        outputs = GatedDelta.apply(*parts)
    else:
        outputs, state = gated_delta(parts, cache.get_recurrent_state(number, state_idx=0))
        cache.update_recurrent_state(state, number)
    outputs = rows.unpad(outputs.to(hidden_states.dtype)).reshape(-1, module.head_v_dim)
    gate = module.in_proj_z(hidden_states).reshape(-1, module.head_v_dim)
    return module.out_proj(module.norm(outputs, gate).view(*hidden_states.shape[:-1], -1))


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """[B, T, heads * width] -> [B, heads, T, width]."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Each vector divided by the square root of its mean square, times `scale`."""
    return RMSNorm.apply(x, x.new_full((x.shape[-1],), scale), _EPSILON / x.shape[-1], "plain")


def _convolve(
    module: Any, hidden_states: torch.Tensor, cache: Any = None, rows: RaggedRows | None = None, **_: Any
) -> torch.Tensor:
    """The output [1, tokens, hidden] of a gated short convolution for hidden_states of that shape; see `_mix`."""
    rows = rows or RaggedRows(1, hidden_states.shape[1], None)
    before, after, x = module.in_proj(hidden_states).chunk(3, -1)
    inputs = rows.pad((before * x)[:, None])[:, 0]
    convolved = rows.unpad(_convolved(inputs, module.conv, cache, module.layer_idx)[:, None])[:, :, 0]
    return module.out_proj(after * convolved)


def _convolved(x: torch.Tensor, convolution: torch.nn.Conv1d, cache: Any, number: int) -> torch.Tensor:
    """The causal convolution of each channel of x [B, T, channels], which continues what `cache` has of the layer."""
    taps, length = convolution.weight[:, 0].T.to(x.dtype), x.shape[1]
    if cache is not None:
        x = cache.update_conv_state(x.mT, number, conv_kernel_size=len(taps)).mT
    inputs = functional.pad(x, (0, 0, len(taps) - 1, 0))[:, -length - len(taps) + 1 :]
    result = inputs[:, :length] * taps[0]
    for i in range(1, len(taps)):
        result = torch.addcmul(result, inputs[:, i : i + length], taps[i])
    return result if convolution.bias is None else result + convolution.bias.to(x.dtype)

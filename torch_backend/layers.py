"""Norms and rotary positions with a hand-written backward pass; `autograd.install` puts them in transformers' place."""

from functools import cache
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch

_aten = torch.ops.aten


class RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` in float32 (Zhang and Sennrich 2019); Gemma's weight is one less.

    Kept: x in its own type, and a number for each row.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool) -> torch.Tensor:
        if x.is_cuda:  # one kernel, float32 within; Gemma's weight would be rounded by it
            weight = 1 + weight.float() if gemma else weight.to(x.dtype)
            result, factor = _aten._fused_rms_norm(x.to(weight.dtype), weight.shape, weight, eps)
            ctx.save_for_backward(x, factor, weight)
            return result.to(x.dtype)
        exact = x.float()
        factor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factor, weight)
        ctx.gemma = gemma
        result = exact * factor
        if gemma:
            return result.mul_(1 + weight.float()).to(x.dtype)
        return result.to(x.dtype).mul_(weight)  # rounded before the weight, as in transformers

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factor, weight = ctx.saved_tensors
        if x.is_cuda:
            given = (outputs[0].to(weight.dtype), x.to(weight.dtype), weight.shape, factor, weight)
            return _aten._fused_rms_norm_backward(*given, [True, False])[0].to(x.dtype), None, None, None
        grad_output = outputs[0].float() * ((1 + weight.float()) if ctx.gemma else weight.float())
        straight = x.float() * factor
        along = torch.linalg.vecdot(grad_output, straight).unsqueeze(-1).div_(x.shape[-1])
        return grad_output.sub_(straight.mul_(along)).mul_(factor).to(x.dtype), None, None, None


class Rope(torch.autograd.Function):
    """Rotary position embedding of x [1, heads, tokens, d], d's halves paired (Su et al. 2021); nothing of x is kept.

    cos and sin [1, tokens, rotary], alike in both halves; what d has beyond rotary stays as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(outputs[0], cos, sin, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None, :, :half]
    result = torch.empty_like(x)
    torch.mul(x[..., :rotary], cos, out=result[..., :rotary])
    result[..., :half].addcmul_(x[..., half:rotary], sin, value=-sign)
    result[..., half:rotary].addcmul_(x[..., :half], sin, value=sign)
    if rotary < x.shape[-1]:
        result[..., rotary:] = x[..., rotary:]
    return result


def _rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of transformers' `apply_rotary_pos_emb`."""
    return Rope.apply(query, cos, sin), Rope.apply(key, cos, sin)


@cache
def calling_rope(forward: Any) -> FunctionType:
    """An attention's own forward with `_rope` for its module's; nothing of transformers is changed for others."""
    plain = unwrap(forward)
    scope = plain.__globals__ | {"apply_rotary_pos_emb": _rope}
    made = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made

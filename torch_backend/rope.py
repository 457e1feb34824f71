"""Rotary position embedding with a hand-written backward pass, and how an attention of transformers calls it."""

from functools import cache, partial
from inspect import signature, unwrap
from types import FunctionType
from typing import Any

import torch

from torch_backend import fused


class Rope(torch.autograd.Function):
    """Rotary position embedding of x [1, heads, tokens, d] (Su et al. 2021); nothing of x is kept.

    It pairs the halves of d, or each value with the next (interleaved). cos and sin [1, tokens, rotary] are the same in
    both halves; what d has beyond rotary is left as it is.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(outputs[0], cos, sin, -1, ctx.interleaved), None, None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, interleaved: bool) -> torch.Tensor:
    if triton := fused.kernels(x):
        return triton.rotated(x, cos, sin, sign, interleaved)
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    first, second = slice(half), slice(half, rotary)
    if interleaved:
        first, second = slice(0, rotary, 2), slice(1, rotary, 2)
        cos = cos[..., :half].repeat_interleave(2, -1)
    cos, sin = cos[:, None], sin[:, None, :, :half]
    result = torch.empty_like(x)
    torch.mul(x[..., :rotary], cos, out=result[..., :rotary])
    result[..., first].addcmul_(x[..., second], sin, value=-sign)
    result[..., second].addcmul_(x[..., first], sin, value=sign)
    if rotary < x.shape[-1]:
        result[..., rotary:] = x[..., rotary:]
    return result


def _apply_to_one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> torch.Tensor:
    """In place of Gemma 4's function of that name, whose x may be [1, tokens, heads, d] (unsqueeze_dim 2)."""
    if unsqueeze_dim == 2:
        return Rope.apply(x.transpose(1, 2), cos, sin).transpose(1, 2)
    return Rope.apply(x, cos, sin)


def _apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the function of that name in transformers."""
    return Rope.apply(query, cos, sin, interleaved), Rope.apply(key, cos, sin, interleaved)


@cache
def calling_rope(forward: Any) -> FunctionType:
    """An attention's forward with `Rope` in place of its module's own; other models of transformers are not changed.

    Raises AssertionError where the forward does not read `apply_rotary_pos_emb`, which would leave it as it is.
    """
    plain = unwrap(forward)
    if _NAME not in plain.__code__.co_names or _NAME not in plain.__globals__:
        raise AssertionError(f"{plain.__qualname__} does not call {_NAME}: this transformers is not known here")
    takes_one = next(iter(signature(plain.__globals__[_NAME]).parameters)) == "x"
    interleaved = plain.__qualname__.startswith("Glm4")
    apply = _apply_to_one if takes_one else partial(_apply_rotary_pos_emb, interleaved=interleaved)
    scope = plain.__globals__ | {_NAME: apply}
    made = FunctionType(plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__)
    made.__kwdefaults__ = plain.__kwdefaults__
    return made


_NAME = "apply_rotary_pos_emb"

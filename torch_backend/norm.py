"""RMS norm with a hand-written backward pass."""

from typing import Any

import torch

_aten = torch.ops.aten


class RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` in float32 (Zhang and Sennrich 2019); Gemma's weight is one less.

    Kept for the backward pass: x in its own type, and one number for each row.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool) -> torch.Tensor:
        if x.is_cuda:  # one kernel, float32 within; it would round Gemma's weight
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
        normalized = x.float() * factor
        along = torch.linalg.vecdot(grad_output, normalized).unsqueeze(-1).div_(x.shape[-1])
        return grad_output.sub_(normalized.mul_(along)).mul_(factor).to(x.dtype), None, None, None

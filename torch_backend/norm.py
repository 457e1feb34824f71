"""RMS norm with a hand-written backward pass."""

from typing import Any, Literal

import torch

from torch_backend import fused

_aten = torch.ops.aten
# Rounded before the weight; or after it, which is stored less one (Gemma 2 and 3, Qwen3.5) or as it is (OLMo, Gemma 4).
Norm = Literal["plain", "centered", "late"]


class RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * weight` in float32 (Zhang and Sennrich 2019), as transformers rounds it.

    Kept for the backward pass: x in its own type, and one number for each row.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Norm) -> torch.Tensor:
        ctx.centered = kind == "centered"
        if triton := fused.kernels(x):
            result, factor = triton.rms_norm(x, weight, eps, float(ctx.centered), kind == "plain")
            ctx.save_for_backward(x, factor, weight)
            return result
        if x.is_cuda:  # one kernel, float32 within; it would round a centered weight
            weight = 1 + weight.float() if kind == "centered" else weight.to(x.dtype)
            result, factor = _aten._fused_rms_norm(x.to(weight.dtype), weight.shape, weight, eps)
            ctx.save_for_backward(x, factor, weight)
            return result.to(x.dtype)
        exact = x.float()
        factor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factor, weight)
        result = exact * factor
        if kind == "plain":
            return result.to(x.dtype).mul_(weight)
        return result.mul_(1 + weight.float() if ctx.centered else weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factor, weight = ctx.saved_tensors
        if triton := fused.kernels(x):
            return triton.rms_norm_grad(outputs[0], x, weight, factor, float(ctx.centered)), None, None, None
        if x.is_cuda:
            given = (outputs[0].to(weight.dtype), x.to(weight.dtype), weight.shape, factor, weight)
            return _aten._fused_rms_norm_backward(*given, [True, False])[0].to(x.dtype), None, None, None
        grad_output = outputs[0].float() * ((1 + weight.float()) if ctx.centered else weight.float())
        normalized = x.float() * factor
        along = torch.linalg.vecdot(grad_output, normalized).unsqueeze(-1).div_(x.shape[-1])
        return grad_output.sub_(normalized.mul_(along)).mul_(factor).to(x.dtype), None, None, None

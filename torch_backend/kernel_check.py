"""A check of Triton's kernels on this GPU, at a model's own sizes, which also compiles them before the first step."""

from collections.abc import Callable, Iterator
from subprocess import SubprocessError
from typing import Any

import torch

from common.errors import first_line
from torch_backend import fused
from torch_backend.layers import norm_kind
from torch_backend.mlp import Gated
from torch_backend.norm import RMSNorm
from torch_backend.rope import Rope

_TOKENS = 48
# Of the largest value; in bf16 one rounding is 0.4 %, and torch's kernels round more often.
_APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_kernels(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Have an NVIDIA GPU use Triton's kernels; or a warning that says why it does not.

    model: of transformers, of a known architecture, wherever it is. dtype: of its activations.
    """
    fault = _fault(model, device, dtype) if device.type == "cuda" else ""
    return fault and f"Training is slower than it could be: Triton's kernels are not used, as {fault}."


def _fault(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels are not used: they cannot be compiled here, or compute something else than torch's."""
    fused.use(None)
    try:
        from triton.errors import TritonError

        from torch_backend import triton_kernels
    except ImportError:
        return "triton is not installed"
    cases = [*_cases(model, device, dtype)]
    plain = [_values(*case) for case in cases]
    fused.use(triton_kernels)
    try:
        found = [_values(*case) for case in cases]
    except (TritonError, RuntimeError, OSError, SubprocessError) as error:  # of its compilers, or of the driver
        fused.use(None)
        return f"they cannot be compiled here: {first_line(error)}"
    pairs = [pair for one, other in zip(plain, found, strict=True) for pair in zip(one, other, strict=True)]
    if all(_close(one, other) for one, other in pairs):
        return ""
    fused.use(None)
    return "they compute other values than torch on this GPU"


def _cases(
    model: Any, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Functions, and what they compute with: norms, rotations and activations of the sizes of `model`."""
    config = model.config
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    weights = {(norm_kind(type(m).__name__), len(m.weight)): m.weight for m in norms if hasattr(m, "weight")}
    for (kind, width), stored in weights.items():
        weight = stored.to(device)
        yield lambda x, weight=weight, kind=kind: RMSNorm.apply(x, weight, 1e-6, kind), [draw(1, _TOKENS, width)]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cos, sin = (draw(1, _TOKENS, head // 2).repeat(1, 1, 2) for _ in range(2))
    interleaved = type(model).__name__.startswith("Glm4")
    for heads in {config.num_attention_heads, config.num_key_value_heads}:
        yield lambda x: Rope.apply(x, cos, sin, interleaved), [draw(1, _TOKENS, heads, head).transpose(1, 2)]
    gelu = type(model).__name__.startswith("Gemma")
    yield lambda gate, up: Gated.apply(gate, up, gelu), [draw(1, _TOKENS, config.intermediate_size) for _ in range(2)]


def _values(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the function computes, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        result = function(*leaves)
        grads = torch.autograd.grad(result, leaves, inputs[0].view_as(inputs[0]))
    return [result.detach(), *grads]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    apart = (one.float() - other.float()).abs().max()
    return bool(apart <= _APART[one.dtype] * one.float().abs().max())

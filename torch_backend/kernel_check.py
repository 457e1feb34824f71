"""A check of Triton's kernels on this GPU, at a model's own sizes, which also compiles them before the first step."""

from collections.abc import Callable, Iterator
from subprocess import SubprocessError
from typing import Any

import torch

from common.errors import first_line
from torch_backend import fused
from torch_backend.device_errors import out_of_memory
from torch_backend.layers import mlp_inputs, mlp_of, norm_kind
from torch_backend.mlp import Gated
from torch_backend.norm import RMSNorm
from torch_backend.rope import Rope

_TOKENS = 48
# Of the largest value; in bf16 one rounding is 0.4 %, and torch's kernels round more often.
_APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_failed: set[torch.device] = set()

Case = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]


def check_kernels(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Have an NVIDIA GPU use Triton's kernels; or a warning that says why it does not, once in a process.

    model: of transformers, of a known architecture, on any device. dtype: of its activations. Where the kernels of one
    model are at fault, those of the next are not tried.
    """
    if device.type != "cuda":
        return ""
    if device in _failed:
        fused.use(None)
        return ""
    fault = _fault(model, device, dtype)
    if not fault:
        return ""
    _failed.add(device)
    return f"This GPU computes slower than it could: Triton's kernels are not used, as {fault}."


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
    # of its compilers, of the driver, which it also asserts to be there, or of its cache, whose modules it imports
    except (TritonError, RuntimeError, OSError, SubprocessError, AssertionError, ImportError, ValueError) as error:
        fused.use(None)
        if out_of_memory(error):
            raise
        return f"they cannot be compiled here: {first_line(error)}"
    pairs = [pair for one, other in zip(plain, found, strict=True) for pair in zip(one, other, strict=True)]
    if all(_close(one, other) for one, other in pairs):
        return ""
    fused.use(None)
    return "they compute other values than torch on this GPU"


def _cases(model: Any, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Functions, and what they compute with, for each size of norms, rotations and activations in `model`."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    for kind, width, eps, stored in sorted(_norms(model), key=str):
        weight = draw(width).to(stored)
        # of small values eps is a part
        scales = torch.tensor([1.0, eps**0.5], device=device).repeat(_TOKENS // 2)[:, None].to(dtype)
        inputs = [draw(1, _TOKENS, width) * scales]
        yield lambda x, weight=weight, eps=eps, kind=kind: RMSNorm.apply(x, weight, eps, kind), inputs
    interleaved = type(model).__name__.startswith("Glm4")
    for heads, width, rotary in sorted(_rotations(model)):
        cos, sin = (draw(1, _TOKENS, rotary // 2).repeat(1, 1, 2) for _ in range(2))
        inputs = [draw(1, _TOKENS, heads, width).transpose(1, 2)]
        yield lambda x, cos=cos, sin=sin: Rope.apply(x, cos, sin, interleaved), inputs
    gelu = type(model).__name__.startswith("Gemma")
    for width, joined in sorted(_activations(model)):
        both = draw(1, _TOKENS, 2 * width).chunk(2, dim=-1)
        inputs = [each if joined else each.contiguous() for each in both]
        yield lambda gate, up: Gated.apply(gate, up, gelu), inputs


def _norms(model: Any) -> set[tuple[Any, int, float, torch.dtype]]:
    """(kind, width, eps, type of the weight)"""
    found = set()
    for module in model.modules():
        name = type(module).__name__
        if name.endswith(("RMSNorm", "RMSNormGated")) and hasattr(module, "weight"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            kind = "plain" if name.endswith("Gated") else norm_kind(name)
            found.add((kind, len(module.weight), eps, module.weight.dtype))
    return found


def _rotations(model: Any) -> set[tuple[int, int, int]]:
    """(heads, values of a head, how many of these are rotated)"""
    rotaries = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    heads = set()
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            output = module.o_proj if hasattr(module, "o_proj") else module.out_proj
            counts = {output.in_features // module.head_dim}
            if hasattr(module, "k_proj"):
                counts.add(module.k_proj.out_features // module.head_dim)
            elif hasattr(module, "qkv_proj"):  # Phi-3
                counts.add(module.config.num_key_value_heads)
            heads |= {(count, module.head_dim) for count in counts}
    return {(count, width, rotary) for count, width in heads for rotary in rotaries if rotary <= width}


def _activations(model: Any) -> set[tuple[int, bool]]:
    """(width, whether gate and up are parts of one tensor)"""
    found = set()
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            inputs, down = mlp_inputs(mlp_of(module))
            if down is not None:
                found.add((down.in_features, len(inputs) == 1))
        elif type(module).__name__.endswith("RMSNormGated"):
            found.add((len(module.weight), False))
    return found


def _values(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the function computes, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        result = function(*leaves)
        weights = torch.linspace(-1, 1, result.numel(), device=result.device)
        grads = torch.autograd.grad(result, leaves, weights.view(result.shape).to(result.dtype))
    return [result.detach(), *grads]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    apart = (one.float() - other.float()).abs().max()
    return bool(apart <= _APART[one.dtype] * one.float().abs().max())

"""Products with a frozen weight. One of 16 bits that the CPU does not compute in is widened a block at a time.

The block stays in the cache: measured from 1 to 350 rows, that costs a product next to nothing, and the weight takes
half the memory. bf16 products of torch itself, on a CPU without instructions for them, ran at 19 GFLOP/s (x @ W.T) and
1 (x @ W), float32's at 120.
"""

import threading
from collections.abc import Iterator
from functools import cache

import torch

from common.system.hardware import cpu_bf16

_BLOCK = 2**20  # weights widened at a time: 4 MB in float32


@cache
def _cpu_computes_bf16() -> bool:
    return bool(cpu_bf16())


def multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Of which the rows of products are to be multiples.

    oneDNN compiles a CPU's bf16 products for every new shape and keeps them: on rows of varied length 360 MB after 40
    steps and growing, with multiples of 16 110 MB, and steps no longer.
    """
    return 16 if device.type == "cpu" and dtype == torch.bfloat16 and _cpu_computes_bf16() else 1


_scratch = threading.local()  # memory of a block: a new one for each product cost page faults


def widened(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype`, the activations' own, take `weight` in float32 though it is stored in 16 bits."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return dtype != weight.dtype or not _cpu_computes_bf16()


def _blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    rows = min(len(weight), max(1, _BLOCK // weight.shape[1]))
    if getattr(_scratch, "memory", torch.empty(0)).numel() < rows * weight.shape[1]:
        _scratch.memory = torch.empty(max(_BLOCK, weight.shape[1]))
    wide = _scratch.memory[: rows * weight.shape[1]].view(rows, weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + len(part)), wide[: len(part)].copy_(part)


def forth(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for x [N, in] and weight [out, in]; float32 where the weight is widened, else in their type."""
    if not widened(weight, x.dtype):
        return x @ weight.T
    x = x.float()
    result = x.new_empty(len(x), len(weight))
    for block, wide in _blocks(weight):
        torch.mm(x, wide.T, out=result[:, block])
    return result


def upright(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`weight @ x.T` [out, N] in float32: where out is in the tens of thousands, up to twice as fast as `forth`.

    out: float32 memory of out x N numbers or more, which the result lies in.
    """
    result = out.flatten()[: len(weight) * len(x)].view(len(weight), len(x))
    if not widened(weight, x.dtype):
        if weight.dtype == torch.float32:
            return torch.mm(weight, x.T, out=result)
        if weight.is_cuda:
            return torch.mm(weight, x.T, out_dtype=torch.float32, out=result)
        return result.copy_(weight @ x.T)
    turned = x.float().T
    for block, wide in _blocks(weight):
        torch.mm(wide, turned, out=result[block])
    return result


def back(grad_output: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`grad_output @ weight` for grad_output [N, out]; float32 where the weight is widened, else in the weight's type.

    dtype: of the activations.
    """
    if not widened(weight, dtype):
        return grad_output.to(weight.dtype) @ weight
    grad_output = grad_output.float()
    result = grad_output.new_zeros(len(grad_output), weight.shape[1])
    for block, wide in _blocks(weight):
        result.addmm_(grad_output[:, block], wide)
    return result

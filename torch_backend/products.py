"""Products with a frozen weight. Where a CPU has no bf16 instructions, a bf16 weight is widened a block at a time.

torch's bf16 products on such a CPU ran at 19 GFLOP/s (x @ W.T) and 1 (x @ W), float32's at 120: widening a block
costs less, rounds less, and leaves the weight in two bytes.
"""

from functools import cache

import torch

from common.dispatch import cpu_bf16

_BLOCK = 2**23  # weights widened at a time: 32 MB in float32


@cache
def _cpu_computes_bf16() -> bool:
    return bool(cpu_bf16())


def widened(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not _cpu_computes_bf16()


def _blocks(weight: torch.Tensor) -> list[slice]:
    rows = max(1, _BLOCK // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def forth(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for x [N, in] and weight [out, in]; float32 where the weight was widened, else in their type."""
    if not widened(weight):
        return x @ weight.T
    x = x.float()
    result = x.new_empty(len(x), len(weight))
    for block in _blocks(weight):
        torch.mm(x, weight[block].float().T, out=result[:, block])
    return result


def back(grown: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`grown @ weight` for grown [N, out]; float32 where the weight was widened, else in their type."""
    if not widened(weight):
        return grown.to(weight.dtype) @ weight
    grown = grown.float()
    result = grown.new_zeros(len(grown), weight.shape[1])
    for block in _blocks(weight):
        result.addmm_(grown[:, block], weight[block].float())
    return result

"""Products with a frozen weight. A 16-bit weight that the CPU does not compute in is widened a block at a time.

The block stays in the cache: for 1 to 350 rows that costs a product next to nothing, and the weight takes half the
memory. On a CPU without bf16 instructions torch's own bf16 products ran at 19 GFLOP/s (x @ W.T) and 1 (x @ W), its
float32 products at 120.
"""

import threading
from collections.abc import Iterator

import torch

from common.system.hardware import cpu_bf16
from torch_backend.memory_terms import PAD_MULTIPLE

_BLOCK = 2**20  # weights widened at a time: 4 MB in float32


def cpu_computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is bf16 on a CPU that multiplies bf16."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(cpu_bf16())


def pad_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """The number to whose multiples the rows of products should be padded.

    oneDNN compiles a CPU's bf16 products for every new shape and keeps them. Rows of varied length took 360 MB after 40
    steps and growing; with multiples of 16 they took 110 MB, in steps of the same time.
    """
    return PAD_MULTIPLE if cpu_computes(device, dtype) else 1


_scratch = threading.local()  # the memory of a block: a new one for each product would cost page faults


def widened(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products take the stored 16-bit `weight` in float32. dtype: the activations' type."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    return dtype != weight.dtype or not cpu_bf16()


def _blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of rows, each with its float32 values, which the next block overwrites."""
    rows = min(len(weight), max(1, _BLOCK // weight.shape[1]))
    if getattr(_scratch, "memory", torch.empty(0)).numel() < rows * weight.shape[1]:
        _scratch.memory = torch.empty(max(_BLOCK, weight.shape[1]))
    wide = _scratch.memory[: rows * weight.shape[1]].view(rows, weight.shape[1])
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        yield slice(start, start + len(part)), wide[: len(part)].copy_(part)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for x [N, in] and weight [out, in]; float32 where the weight is widened, else in their type."""
    if not widened(weight, x.dtype):
        return x @ weight.T
    x = x.float()
    result = x.new_empty(len(x), len(weight))
    for block, wide in _blocks(weight):
        torch.mm(x, wide.T, out=result[:, block])
    return result


def linear_transposed(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`weight @ x.T` [out, N] in float32, written into `out`: float32 memory of out x N numbers or more.

    Where weight has tens of thousands of rows, this is up to twice as fast as `linear`.
    """
    result = out.flatten()[: len(weight) * len(x)].view(len(weight), len(x))
    if not widened(weight, x.dtype):
        if weight.dtype == torch.float32:
            return torch.mm(weight, x.T, out=result)
        if weight.is_cuda:
            return torch.mm(weight, x.T, out_dtype=torch.float32, out=result)
        return result.copy_(weight @ x.T)
    transposed = x.float().T
    for block, wide in _blocks(weight):
        torch.mm(wide, transposed, out=result[block])
    return result


def linear_grad_input(
    grad_output: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, result: torch.Tensor | None = None
) -> torch.Tensor:
    """`grad_output @ weight` [N, in] for grad_output [N, out]; float32 where the weight is widened, else in its type.

    dtype: the activations' type. result: an earlier one, to which this is added.
    """
    if not widened(weight, dtype):
        grad_output = grad_output.to(weight.dtype)
        return grad_output @ weight if result is None else result.addmm_(grad_output, weight)
    grad_output = grad_output.float()
    if result is None:
        result = grad_output.new_zeros(len(grad_output), weight.shape[1])
    for block, wide in _blocks(weight):
        result.addmm_(grad_output[:, block], wide)
    return result

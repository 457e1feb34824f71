"""Triton kernels for an NVIDIA GPU: each computes at once what torch computes in several kernels.

A value is read once, computed in float32, and rounded once. Imports triton, which torch's CUDA builds bring along;
`fused.py` says whether these are used. Every kernel gives the same bits each time.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # values of a program, where a row has more


def gated(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """`act(gate) * up` [..., d], contiguous.

    gelu: act is GELU by tanh, which is `x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3))`; else SiLU.
    """
    result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    count, width = gate.shape
    grid = (count, triton.cdiv(width, _BLOCK))
    _gated[grid](gate, up, result, gate.stride(0), up.stride(0), width, gelu, _BLOCK)
    return result


def gated_grads(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, contiguous, given that of `gated`."""
    found = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    count, width = gate.shape
    grid = (count, triton.cdiv(width, _BLOCK))
    strides = (grad.stride(0), gate.stride(0), up.stride(0))
    _gated_grads[grid](grad, gate, up, *found, *strides, width, gelu, _BLOCK)
    return found[0], found[1]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, d], the values of a row side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def _gated(  # noqa: PLR0913
    gate, up, result, gate_row, up_row, width, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    g = tl.load(gate + row * gate_row + column, valid, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, valid, 0.0).to(tl.float32)
    if GELU:
        sigmoid = 1 / (1 + tl.exp(-g * (1.5957691216057308 + 0.07135481282553632 * g * g)))
    else:
        sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(result + row * width + column, g * sigmoid * u, valid)


@triton.jit  # type: ignore[untyped-decorator]
def _gated_grads(  # noqa: PLR0913
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    grad_row,
    gate_row,
    up_row,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    d = tl.load(grad + row * grad_row + column, valid, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, valid, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, valid, 0.0).to(tl.float32)
    if GELU:
        sigmoid = 1 / (1 + tl.exp(-g * (1.5957691216057308 + 0.07135481282553632 * g * g)))
        inner = 1.5957691216057308 + 0.21406443847660897 * g * g  # the derivative of what the sigmoid is of
        slope = sigmoid * (1 + g * (1 - sigmoid) * inner)
    else:
        sigmoid = 1 / (1 + tl.exp(-g))
        slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(grad_gate + row * width + column, d * u * slope, valid)
    tl.store(grad_up + row * width + column, d * g * sigmoid, valid)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, interleaved: bool) -> torch.Tensor:
    """`rope.Rope` of x [1, heads, tokens, d]; sign -1: its transpose, which is the backward pass."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    result, half = torch.empty_like(x), cos.shape[-1] // 2
    heads, tokens = x.shape[1:3]
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(x.shape[-1])
    strides = (*x.stride()[1:3], *result.stride()[1:3], cos.stride(-2), sin.stride(-2))
    layout = (2, 1) if interleaved else (1, half)  # from a pair to the next, and to its second value
    sizes = (heads, x.shape[-1], half, sign, *layout, *blocks)
    _rotated[(tokens,)](x, result, cos, sin, *strides, *sizes, num_warps=_warps(blocks[0] * blocks[1]))
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(  # noqa: PLR0913
    x,
    result,
    cos,
    sin,
    x_head,
    x_token,
    result_head,
    result_token,
    cos_token,
    sin_token,
    heads,
    width,
    HALF: tl.constexpr,
    SIGN: tl.constexpr,
    STEP: tl.constexpr,
    SECOND: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program computes a token: value i and the other of its pair, in two reads that the cache joins."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    turned = i < 2 * HALF
    if STEP == 1:
        pair, second = tl.where(i < HALF, i, i - HALF), i >= HALF
    else:
        pair, second = i // 2, i % 2 == 1
    other = tl.where(second, i - SECOND, i + SECOND)
    valid = (head < heads) & (i < width)
    at = x + token * x_token + head * x_head
    own = tl.load(at + i, valid, 0.0).to(tl.float32)
    partner = tl.load(at + other, valid & turned, 0.0).to(tl.float32)
    c = tl.load(cos + token * cos_token + pair, turned, 1.0).to(tl.float32)
    s = tl.load(sin + token * sin_token + pair, turned, 0.0).to(tl.float32)
    found = own * c + tl.where(second, SIGN * s, -SIGN * s) * partner
    tl.store(result + token * result_token + head * result_head + i, found, valid)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, early: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x / sqrt(mean(x^2) + eps) * (offset + weight), 1 / sqrt(mean(x^2) + eps))`: [..., d] and float32 [N].

    early: what the weight multiplies is rounded to the type of x before.
    """
    rows = _rows(x)
    result = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    factor = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    grid, blocks = _norm_grid(rows)
    _rms_norm[grid](
        rows,
        weight,
        result,
        factor,
        rows.stride(0),
        *rows.shape,
        eps,
        offset,
        early,
        *blocks,
        num_warps=_warps(blocks[1]),
    )
    return result.view(x.shape), factor


def rms_norm_grad(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor, offset: float
) -> torch.Tensor:
    """The gradient of x. factor: of `rms_norm`."""
    rows, grads = _rows(x), _rows(grad)
    result = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    grid, blocks = _norm_grid(rows)
    strides = (grads.stride(0), rows.stride(0))
    _rms_norm_grad[grid](
        grads, rows, weight, factor, result, *strides, *rows.shape, offset, *blocks, num_warps=_warps(blocks[1])
    )
    return result.view(x.shape)


def _warps(values: int) -> int:
    """Of a program, of 32 threads each, so that a thread has registers for its values."""
    return min(16, max(4, values // 256))


def _norm_grid(rows: torch.Tensor) -> tuple[tuple[int], tuple[int, int]]:
    """Programs, and rows and values of each: heads are short rows, many of which make one program."""
    width = triton.next_power_of_2(rows.shape[1])
    count = max(1, _BLOCK // width)
    return (triton.cdiv(len(rows), count),), (count, width)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _rms_norm(  # noqa: PLR0913
    x,
    weight,
    result,
    factor,
    x_row,
    count,
    width,
    eps,
    offset,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    valid = (row[:, None] < count) & (i < width)
    values = tl.load(x + row[:, None] * x_row + i, valid, 0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(factor + row, scale, row < count)
    normed = values * scale[:, None]
    if EARLY:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + i, i < width, 0.0).to(tl.float32) + offset
    tl.store(result + row[:, None] * width + i, normed * weights, valid)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _rms_norm_grad(  # noqa: PLR0913
    grad,
    x,
    weight,
    factor,
    result,
    grad_row,
    x_row,
    count,
    width,
    offset,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    valid = (row[:, None] < count) & (i < width)
    scale = tl.load(factor + row, row < count, 0.0)[:, None]
    normed = tl.load(x + row[:, None] * x_row + i, valid, 0.0).to(tl.float32) * scale
    weights = tl.load(weight + i, i < width, 0.0).to(tl.float32) + offset
    weighted = tl.load(grad + row[:, None] * grad_row + i, valid, 0.0).to(tl.float32) * weights
    along = tl.sum(weighted * normed, 1)[:, None] / width
    tl.store(result + row[:, None] * width + i, (weighted - normed * along) * scale, valid)

"""Frozen linear layers and their LoRA or DoRA, with a backward pass written by hand.

transformers and PEFT are right but general: they keep what a frozen model never needs again. These keep less, and read
memory fewer times.
"""

from collections.abc import Sequence
from typing import Any

import torch

from torch_backend.matmul import cpu_computes, linear, linear_grad_input, widened


class LoraGroup:
    """PEFT's layers, of one scale, that read the same input; their A are stacked, so that one product serves all."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.bases = [layer.base_layer for layer in layers]
        self.scale: float = layers[0].scaling["default"]
        self._dropout = layers[0].lora_dropout["default"]  # the identity where nothing is dropped
        A, B = ([getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B"))
        vectors = [layer.lora_magnitude_vector for layer in layers]  # empty but for DoRA
        self.magnitudes = [vector["default"].weight for vector in vectors if "default" in vector]
        self.trained = (*A, *B, *self.magnitudes)  # A [r, in], B [out, r], magnitude [out], float32
        self.ranks = [len(each) for each in A]
        self.copies: list[torch.Tensor] = []
        self._squares: dict[int, torch.Tensor] = {}  # by layer, of the lengths of its base's rows
        self._found: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None

    def make_copies(self, dtype: torch.dtype) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]] | None:
        """Have products read copies of A and B; `(copies, originals)`, to copy whenever these have changed.

        dtype: of activations. None where products read float32 itself.
        """
        device = self.trained[0].device
        if (dtype := lora_type(device, dtype)) == torch.float32:
            return None
        stacked = torch.empty(sum(self.ranks), self.trained[0].shape[1], dtype=dtype, device=device)
        each = [torch.empty_like(B, dtype=dtype) for B in self._B]
        self.copies = [stacked, *each]
        return [*stacked.split(self.ranks), *each], [matrix.data for matrix in (*self._A, *self._B)]

    @property
    def _A(self) -> Sequence[torch.Tensor]:
        return self.trained[: len(self.bases)]

    @property
    def _B(self) -> Sequence[torch.Tensor]:
        return self.trained[len(self.bases) : 2 * len(self.bases)]

    def stacked_A(self, dtype: torch.dtype) -> torch.Tensor:
        """[sum of r, in], in this type."""
        if self.copies and self.copies[0].dtype == dtype:
            return self.copies[0]
        return (torch.cat([*self._A]) if len(self.bases) > 1 else self._A[0]).to(dtype)

    def each_B(self, dtype: torch.dtype) -> list[torch.Tensor]:
        if self.copies and self.copies[0].dtype == dtype:
            return self.copies[1:]
        return [each.to(dtype) for each in self._B]

    @property
    def dropped(self) -> float:
        """Share of the inputs of A that become 0: in training alone."""
        return getattr(self._dropout, "p", 0.0) if self._dropout.training else 0.0

    @property
    def applied_scale(self) -> float:
        """The scale, with dropout's own for the inputs that are left."""
        return self.scale / (1 - self.dropped)

    def draw_mask(self, flat: torch.Tensor) -> torch.Tensor | None:
        """Which inputs A reads, one mask for all layers; None where it reads them all."""
        if not self.dropped:
            return None
        if flat.device.type != "cpu":
            return torch.empty_like(flat, dtype=torch.bool).bernoulli_(1 - self.dropped)
        # 16 random bits a value: on two cores 2 ns, where bernoulli_ takes 13, a fourth of a step
        bits = torch.empty(-(-flat.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        first_kept = min(round(self.dropped * 2**16), 2**16 - 1) - 2**15
        return (bits[: flat.numel()] >= first_kept).view(flat.shape)

    @torch.no_grad()
    def gain(self, number: int, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """DoRA's of a layer: magnitude / length - 1 for the rows of `W + scale * B @ A` [out], in this type.

        Less 1, as bf16 has no number between 1 and 1.0078. The sum is never made. The length is a constant in the
        backward pass (Liu et al. 2024, 4.3). weight: W.
        """
        if number not in self._squares:
            self._squares[number] = weight.float().square().sum(1)
        squares, A, B = self._squares[number], self._A[number], self._B[number]
        if not widened(weight, A.dtype):
            A = A.to(weight.dtype)  # of both terms, which may cancel each other
        across = (_float32_product(A, weight.T) if A.dtype == weight.dtype else linear(A, weight)).T  # [out, r]
        A = A.float()
        more = (B * (2 * self.scale * across + self.scale**2 * (B @ (A @ A.T)))).sum(1)
        length = torch.maximum(squares + more, 1e-8 * squares).sqrt()
        return (self.magnitudes[number] / length - 1).to(dtype)

    def output(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Of the layer of this number. The first that is asked for computes all; `forget` drops what nobody takes."""
        if self._found is None or self._found[0] is not x:
            self._found = x, [*LoraLinear.apply(x, self, *self.trained)]
        result, self._found[1][number] = self._found[1][number], None
        if result is None:  # asked for twice
            self._found = None
            return self.output(number, x)
        if not any(each is not None for each in self._found[1]):
            self._found = None
        return result

    def forget(self) -> None:
        self._found = None


class Copies:
    """Of all groups' matrices, in the type that products read; made once a step, and not by every product."""

    def __init__(self, groups: Sequence[LoraGroup], dtype: torch.dtype) -> None:
        """dtype: of the activations. There are none where products read float32."""
        made = [pair for group in groups if (pair := group.make_copies(dtype))]
        self._copies = [copy for copies, _ in made for copy in copies]
        self._originals = [original for _, originals in made for original in originals]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """After the matrices have changed."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)


class LoraLinear(torch.autograd.Function):
    """`(1 + gain) * (x @ W.T + scale * (drop(x) @ A.T) @ B.T) + bias` of each layer of a group, for its frozen W.

    The gain is DoRA's, else 0. With DoRA, too, W reads all of x, as in mlx-lm; in PEFT the gain's W reads what dropout
    leaves. Kept for the backward pass: x in its own type, `scale * drop(x) @ A.T`, dropout's mask, and DoRA's outputs
    before their bias; a W in 4 bits is dequantized again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: LoraGroup, *trained: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """trained: `group.trained`, whose gradients are wanted."""
        flat = x.reshape(-1, x.shape[-1])
        mask = group.draw_mask(flat)
        low = lora_low(masked(flat, mask), group)
        results, kept, ctx.gains = lora_outputs(flat, low, group)
        ctx.save_for_backward(flat, low, mask, *kept)
        ctx.group = group
        return tuple(result.view(*x.shape[:-1], -1).to(x.dtype) for result in results)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[Any, ...]:
        flat, low, mask, *kept = ctx.saved_tensors
        grads, magnitudes = dora_grads(given, kept, ctx.gains, ctx.group)
        grad_low, *matrices = lora_grads(grads, masked(flat, mask), low, ctx.group)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = lora_grad_input(grads, grad_low, mask, ctx.group, flat.dtype)
            grad_x = grad_x.view(*grads[0].shape[:-1], -1).to(flat.dtype)
        return grad_x, None, *matrices, *magnitudes


def lora_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type of the adapter's products: float32 on a CPU, unless that multiplies the activations' bf16 itself.

    There, and on a GPU, float32 would take more time than the base's own products. dtype: of the activations.
    """
    return dtype if device.type == "cuda" or cpu_computes(device, dtype) else torch.float32


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`x` where the mask holds, else 0."""
    return x if mask is None else x * mask


def lora_low(flat: torch.Tensor, group: LoraGroup) -> torch.Tensor:
    """`scale * x @ A.T` [N, sum of r]; flat: x after dropout.

    It is computed as `(A @ x.T).T`, which on a CPU is many times faster.
    """
    dtype = lora_type(flat.device, flat.dtype)
    A = group.stacked_A(dtype)
    low = flat.new_empty(len(A), len(flat), dtype=dtype)
    return low.addmm_(A, flat.to(dtype).T, beta=0, alpha=group.applied_scale).T


def lora_outputs(
    flat: torch.Tensor, low: torch.Tensor, group: LoraGroup
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """[N, out] of each layer: the base's product, rounded as the base computes it, plus the adapter's; and bias.

    Also DoRA's outputs before their bias, in the activations' type, and its gains; else none.
    """
    results, kept, gains = [], [], []
    parts, each_B = low.split(group.ranks, 1), group.each_B(low.dtype)
    for number, base in enumerate(group.bases):
        weight = frozen_weight(base)
        result = linear(flat, weight).to(low.dtype).addmm_(parts[number], each_B[number].T)
        if group.magnitudes:
            gains.append(group.gain(number, weight, low.dtype))
            result = result.addcmul_(result, gains[-1]).to(flat.dtype)
            kept.append(result)
        if base.bias is not None:
            result = result + base.bias if group.magnitudes else result.add_(base.bias)
        results.append(result)
    return results, kept, gains


def dora_grads(
    grads: Sequence[torch.Tensor], kept: Sequence[torch.Tensor], gains: Sequence[torch.Tensor], group: LoraGroup
) -> tuple[Sequence[torch.Tensor], list[torch.Tensor]]:
    """The gradients [..., out] before DoRA's gain, given those of the outputs; and those of the magnitudes.

    kept: of `lora_outputs`. Without DoRA the gradients themselves, and none.
    """
    if not gains:
        return grads, []
    magnitudes = [
        (grad.flatten(0, -2).float() * output.float()).sum(0) / magnitude
        for grad, output, magnitude in zip(grads, kept, group.magnitudes, strict=True)
    ]
    return [torch.addcmul(grad, grad, gain.to(grad.dtype)) for grad, gain in zip(grads, gains, strict=True)], magnitudes


def lora_grads(
    grad_outputs: Sequence[torch.Tensor], flat: torch.Tensor, low: torch.Tensor, group: LoraGroup
) -> list[torch.Tensor]:
    """The gradients of `x @ A.T`, and of each A and B, in float32. flat: x after dropout."""
    exact = [grad.reshape(-1, grad.shape[-1]).to(low.dtype) for grad in grad_outputs]
    grad_low = low.new_empty(low.shape[::-1])
    for part, grad, B in zip(grad_low.split(group.ranks), exact, group.each_B(low.dtype), strict=True):
        part.addmm_(B.T, grad.T, beta=0, alpha=group.applied_scale)
    grad_A = _float32_product(grad_low, flat.to(low.dtype))
    grad_B = [_float32_product(part.T, grad).T for part, grad in zip(low.split(group.ranks, 1), exact, strict=True)]
    return [grad_low.T, *grad_A.split(group.ranks), *grad_B]


def _float32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` added up in float32, whatever their type; on a CPU the sum of bf16 products is then rounded."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def lora_grad_input(
    grads: Sequence[torch.Tensor],
    grad_low: torch.Tensor,
    mask: torch.Tensor | None,
    group: LoraGroup,
    dtype: torch.dtype,
) -> torch.Tensor:
    """grad_x [N, in], given those of the outputs. dtype: the activations' type."""
    result: Any = None
    for grad, base in zip(grads, group.bases, strict=True):
        result = linear_grad_input(grad.reshape(-1, grad.shape[-1]), frozen_weight(base), dtype, result)
    A, result = group.stacked_A(grad_low.dtype), result.to(grad_low.dtype)
    found: torch.Tensor = result.addmm_(grad_low, A) if mask is None else result.addcmul_(grad_low @ A, mask)
    return found


class FrozenLinear(torch.autograd.Function):
    """`x @ W.T + bias` for frozen W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        result = linear(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return (result if bias is None else result.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = linear_grad_input(outputs[0].flatten(0, -2), weight, outputs[0].dtype)
        return grad_x.view(*outputs[0].shape[:-1], -1).to(outputs[0].dtype), None, None


def frozen_weight(base: Any) -> torch.Tensor:
    """[out, in] of a linear layer, dequantized where bitsandbytes holds it in 4 bits."""
    if (state := getattr(base.weight, "quant_state", None)) is None:
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state)

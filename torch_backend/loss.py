"""Cross-entropy at label positions only, and without logits: no `tokens x vocabulary` array ever exists."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.backend import Batch
from common.data.batching import split_batch
from torch_backend.attention import RaggedRows, cu_seqlens, to_device
from torch_backend.matmul import linear_grad_input, linear_transposed


class LinearCrossEntropy(torch.autograd.Function):
    """`sum(-w * log softmax(cap(hidden @ weight.T / divisor))[target])`, float32, the logits of `chunk` rows at a time.

    hidden [N, H], weight [V, H], targets [N] int64; w: loss_weights [N] float32; scaling:
    (divisor, cap), with cap(x) = `cap * tanh(x / cap)`, or x where cap is None.
    Each chunk's gradient is computed with its loss, so that its logits can be freed: what is kept for the backward
    pass has the shape of `hidden` (and of `weight`, where that is trained). Products are computed in the weight's type,
    in float32 where it is widened; everything between is float32.

    After Wijmans et al. 2024 (Cut Your Losses) and liger-kernel's fused linear cross-entropy. Their own kernels are not
    used. On an H200, with 1,024 labels of 262,144, this took 5.8 ms with gradients 0.2 % off. cut-cross-entropy 25.1.1
    took 7.5 ms with 2.7 %, never the same twice, and liger-kernel 0.8.5 43 ms, waiting for the device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        loss_weights: torch.Tensor,
        scaling: tuple[float, float | None],
        chunk: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        divisor, cap = scaling
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        memory = hidden.new_empty(len(weight), min(chunk, len(hidden)), dtype=torch.float32)  # one for all chunks
        for start in range(0, len(hidden), chunk):
            end = start + chunk
            part, target, weights = hidden[start:end], targets[None, start:end], loss_weights[None, start:end]
            logits = linear_transposed(part, weight, memory)  # [V, n]
            derivative = _finish(logits, divisor, cap, needs_hidden)
            logits -= logits.amax(0)
            total -= (logits.gather(0, target) * weights).sum()
            sums = logits.exp_().sum(0)
            total += (sums.log() * weights).sum()
            if not needs_hidden:
                continue
            logits *= weights / sums
            logits[target[0], torch.arange(len(part), device=target.device)] -= weights[0]
            if derivative is not None:
                logits *= derivative
            if divisor != 1.0:
                logits /= divisor
            grad_hidden[start:end] = linear_grad_input(logits.T, weight, hidden.dtype)  # type: ignore[index]
            if needs_weight:
                grad_weight += (logits.to(weight.dtype) @ part).float()  # type: ignore[operator]
            del derivative  # or the next chunk's would be held beside it
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden.float() * grad_output).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(grad_hidden.dtype),
            *(None,) * 4,
        )


def _finish(logits: torch.Tensor, divisor: float, cap: float | None, wanted: bool) -> torch.Tensor | None:
    """Divide and cap logits in place. Returns the cap's derivative where it is `wanted` and not 1."""
    if divisor != 1.0:
        logits /= divisor
    if not cap:
        return None
    logits.div_(cap).tanh_()
    derivative = logits.square().neg_().add_(1) if wanted else None
    logits *= cap
    return derivative


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch with its rows packed, as tensors of int64 on the device; CUDA graphs round all its sizes up."""

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    label_positions: torch.Tensor  # [N], of the tokens that carry loss
    targets: torch.Tensor  # [N], the tokens that follow those
    loss_weights: torch.Tensor  # [N] float32; 0 where N is padded
    rows: RaggedRows


def pack(batch: Batch, device: torch.device, flash: bool, pad_multiple: int = 1) -> PackedBatch:
    """`batch` packed, its tokens, labels and width padded to multiples of `pad_multiple`, which changes no loss."""
    real = np.arange(batch.targets.shape[1]) < batch.lengths[:, None]
    loss_weights = batch.loss_weights[real]
    labeled = loss_weights.nonzero()[0]
    row, column = real.nonzero()
    extra = np.arange(-len(row) % pad_multiple)  # at the end of the last row: no token before them sees these
    rope_positions = np.append(column, np.zeros_like(extra))  # 0 for padding, which lengthens no range of RoPE
    row, column = np.append(row, np.full_like(extra, row[-1])), np.append(column, batch.lengths[-1] + extra)

    def padded(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return to_device(np.append(array, np.zeros(-len(array) % pad_multiple, array.dtype)), device, dtype)

    ids, positions = padded(batch.input_ids[real]), to_device(rope_positions, device)
    label_positions, targets = padded(labeled), padded(batch.targets[real][labeled])
    weights = padded(loss_weights[labeled], torch.float32)
    count, width = len(batch.lengths), -(-int(column.max() + 1) // pad_multiple) * pad_multiple
    if flash:
        rows = RaggedRows(count, width, None, cu_seqlens(batch.lengths, device))
    else:
        indices = row * width + column
        rows = RaggedRows(count, width, None if len(indices) == count * width else to_device(indices, device))
    return PackedBatch(ids, positions, label_positions, targets, weights, rows)


def loss_sum(
    model: Any, batch: Batch, device: torch.device, chunk: int, flash: bool, pad_multiple: int = 1
) -> torch.Tensor:
    """Weighted sum of the token losses of a micro-batch, a float32 scalar.

    model: a causal language model of transformers. chunk: label positions whose logits are held at once. flash:
    attention reads packed rows.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    limit = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
    parts = [loss_of(model, pack(part, device, flash, pad_multiple), chunk) for part in split_batch(batch, limit)]
    return torch.stack(parts).sum()


def loss_of(model: Any, packed: PackedBatch, chunk: int) -> torch.Tensor:
    """`loss_sum` of a packed micro-batch."""
    found = model.model(
        input_ids=packed.ids[None], position_ids=packed.positions[None], use_cache=False, rows=packed.rows
    ).last_hidden_state[0]
    hidden = found.index_select(0, packed.label_positions)
    divisor = getattr(model.config, "logits_scaling", 1.0)  # what the family's own forward does to logits
    cap = getattr(model.config, "final_logit_softcapping", None)
    head = model.lm_head.weight
    return LinearCrossEntropy.apply(hidden, head, packed.targets, packed.loss_weights, (divisor, cap), chunk)

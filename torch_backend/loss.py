"""Cross-entropy at label positions only, and without logits: no `tokens x vocabulary` array ever exists."""

from typing import Any

import numpy as np
import torch

from common.rope import split_batch
from common.seam import IGNORE, Batch
from torch_backend.attention import Rows
from torch_backend.products import back, upright


def _after_head(model: Any) -> tuple[float, float | None]:
    """What the family's own forward does to logits: `(divisor, cap)`."""
    config = model.config
    return getattr(config, "logits_scaling", 1.0), getattr(config, "final_logit_softcapping", None)


class LinearCrossEntropy(torch.autograd.Function):
    """`sum(-log softmax(cap(hidden @ weight.T / divisor))[label])`, float32, the logits of `chunk` rows at a time.

    hidden [N, H], weight [V, H], labels [N] int64; cap(x): x, or `cap * tanh(x / cap)`. Each chunk's gradient is formed
    with its loss, so that its logits can be forgotten: what is kept for the way back has the shape of `hidden` (and of
    `weight`, where that is trained). Products in the weight's type, in float32 where it is widened, as is all between.
    After Wijmans et al. 2024 (Cut Your Losses) and liger-kernel's fused linear cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        divisor: float,
        cap: float | None,
        chunk: int,
    ) -> torch.Tensor:
        wanted, trained = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        memory = hidden.new_empty(len(weight), min(chunk, len(hidden)), dtype=torch.float32)  # one for all chunks
        for start in range(0, len(hidden), chunk):
            part, right = hidden[start : start + chunk], labels[None, start : start + chunk]
            logits = upright(part, weight, memory)  # [V, n]
            if divisor != 1.0:
                logits /= divisor
            slope = None
            if cap:
                logits = logits.div_(cap).tanh_()
                slope = logits.square().neg_().add_(1) if wanted else None
                logits *= cap
            logits -= logits.amax(0)
            total -= logits.gather(0, right).sum()
            sums = logits.exp_().sum(0)
            total += sums.log().sum()
            if not wanted:
                continue
            logits /= sums
            logits.scatter_add_(0, right, torch.full_like(right, -1, dtype=torch.float32))
            if slope is not None:
                logits *= slope
            if divisor != 1.0:
                logits /= divisor
            gradient[start : start + chunk] = back(logits.T, weight, hidden.dtype)  # type: ignore[index]
            if trained:
                weight_gradient += (logits.to(weight.dtype) @ part).float()  # type: ignore[operator]
            del slope  # or the next chunk's would stand beside it
        ctx.save_for_backward(gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grown,) = outputs
        gradient, weight_gradient = ctx.saved_tensors
        return (
            None if gradient is None else gradient * grown.to(gradient.dtype),
            None if weight_gradient is None else (weight_gradient * grown).to(gradient.dtype),
            *(None,) * 4,
        )


def loss_sum(model: Any, batch: Batch, device: torch.device, chunk: int) -> torch.Tensor:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is a causal language model of transformers.

    `chunk`: label positions whose logits are held at once.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    limit = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
    total = torch.zeros((), device=device)
    for part in split_batch(batch, limit):
        real = np.arange(part.labels.shape[1]) < part.lengths[:, None]
        labels = part.labels[real]
        chosen = (labels != IGNORE).nonzero()[0]
        count, width = real.shape
        places = None if real.all() else to_device(real.ravel().nonzero()[0], device)
        hidden = model.model(
            input_ids=to_device(part.input_ids[real], device)[None],
            position_ids=to_device(real.nonzero()[1], device)[None],
            use_cache=False,
            rows=Rows(count, width, places),
        ).last_hidden_state[0]
        hidden = hidden.index_select(0, to_device(chosen, device))
        right = to_device(labels[chosen], device)
        total = total + LinearCrossEntropy.apply(hidden, model.lm_head.weight, right, *_after_head(model), chunk)
    return total


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """As int64, without waiting for the device: from pinned memory where there is one to copy from."""
    tensor = torch.from_numpy(array).to(torch.int64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

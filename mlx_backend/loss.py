"""Cross-entropy at label positions only: no logits are computed where nothing is learned."""

from typing import Any

import mlx.core as mx

from common.rope import split_batch
from common.seam import IGNORE, Batch
from mlx_backend.base import head, hidden_states

_BLOCK = 256


def loss_sum(model: Any, batch: Batch) -> mx.array:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is load_base's."""
    total = mx.array(0.0)
    for part in split_batch(batch, model.facts.rope_split):
        flat = part.labels.ravel()
        chosen = (flat != IGNORE).nonzero()[0]
        hidden = hidden_states(model, mx.array(part.input_ids))
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(chosen)]
        logits = head(model, hidden)
        right = mx.take_along_axis(logits, mx.array(flat[chosen])[:, None], axis=-1)
        total = total + log_sum_exp(logits).sum() - right.sum()
    return total


def log_sum_exp(logits: mx.array) -> mx.array:
    """Over the last axis of [N, vocabulary], in two stages: MLX's CPU adds one by one, and loses 1e-4 over 262k."""
    whole = logits.shape[-1] - logits.shape[-1] % _BLOCK
    parts = [mx.logsumexp(logits[:, :whole].reshape(len(logits), -1, _BLOCK), axis=-1)] if whole else []
    if whole < logits.shape[-1]:
        parts.append(mx.logsumexp(logits[:, whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)

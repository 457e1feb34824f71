"""Cross-entropy at label positions only: no logits are computed where nothing is learned."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.rope import split_batch
from common.seam import IGNORE, Batch
from mlx_backend.base import head, hidden_states


def loss_sum(model: Any, batch: Batch) -> mx.array:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is load_base's."""
    total = mx.array(0.0)
    for part in split_batch(batch, model.facts.rope_split):
        flat = part.labels.ravel()
        chosen = (flat != IGNORE).nonzero()[0]
        hidden = hidden_states(model, mx.array(part.input_ids))
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(chosen)]
        total = total + nn.losses.cross_entropy(head(model, hidden), mx.array(flat[chosen]), reduction="sum")
    return total

"""Cross-entropy at label positions only: no logits are computed where nothing is learned."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.seam import IGNORE, Batch


def head(model: Any, hidden: mx.array) -> mx.array:
    """Hidden states to logits by mlx-lm's model, tied embeddings or not."""
    if "lm_head" in model:
        return model.lm_head(hidden)
    return model.model.embed_tokens.as_linear(hidden)


def loss_sum(model: Any, batch: Batch) -> mx.array:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is one of mlx-lm's."""
    flat = batch.labels.ravel()
    chosen = (flat != IGNORE).nonzero()[0]
    hidden = model.model(mx.array(batch.input_ids))
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(chosen)]
    logits = head(model, hidden).astype(mx.float32)
    return nn.losses.cross_entropy(logits, mx.array(flat[chosen]), reduction="sum")

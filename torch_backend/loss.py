"""Cross-entropy at label positions only: no logits are computed where nothing is learned."""

from typing import Any

import torch
from torch.nn import functional

from common.seam import IGNORE, Batch


def loss_sum(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is a causal language model of transformers."""
    labels = torch.from_numpy(batch.labels).to(device, torch.int64).flatten()
    chosen = torch.from_numpy((batch.labels != IGNORE).ravel().nonzero()[0]).to(device)
    inputs = torch.from_numpy(batch.input_ids).to(device, torch.int64)
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[chosen]).float()
    return functional.cross_entropy(logits, labels[chosen], reduction="sum")

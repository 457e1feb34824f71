"""Cross-entropy at label positions only: no logits are computed where nothing is learned."""

from typing import Any

import torch
from torch.nn import functional

from common.rope import split_batch
from common.seam import IGNORE, Batch


def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states to float32 logits, with what the family's own forward does after its lm_head."""
    config = model.config
    logits = model.lm_head(hidden).float() / getattr(config, "logits_scaling", 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def loss_sum(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is a causal language model of transformers."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    limit = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None
    total = torch.zeros((), device=device)
    for part in split_batch(batch, limit):
        labels = torch.from_numpy(part.labels).to(device, torch.int64).flatten()
        chosen = torch.from_numpy((part.labels != IGNORE).ravel().nonzero()[0]).to(device)
        inputs = torch.from_numpy(part.input_ids).to(device, torch.int64)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = head(model, hidden.flatten(0, 1)[chosen])
        total = total + functional.cross_entropy(logits, labels[chosen], reduction="sum")
    return total

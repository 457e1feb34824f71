"""Losses over label tokens, row by row or in random groups of rows, so that an interval can be drawn from them."""

from collections.abc import Sequence

import numpy as np

from common.backend import Backend, Progress
from common.data.batching import make_batch, micro_batches
from common.data.encode import Encoded
from common.llama_cpp.logits import GgufLogits
from common.recipe import Plan

_GROUPS = 200
_HELD = 100_000_000  # logits at a time

Loss = tuple[float, float]  # summed over the label tokens of a row, each times its weight; and the sum of the weights


def backend_loss(backend: Backend, row: Encoded) -> Loss:
    """Of the model that is loaded, with its adapter."""
    result = backend.eval_step(make_batch([row]))
    return float(result.loss_sum), result.weight_sum


def gguf_loss(model: GgufLogits, row: Encoded) -> Loss:
    """The same over the same tokens, as llama.cpp computes the GGUF."""
    labels = np.flatnonzero(row.mask[1:])
    weights = row.loss_weights[1:][labels].astype(np.float64)
    losses = []
    for part in np.array_split(labels, -(-len(labels) * model.vocabulary // _HELD)):
        logits = model(row.ids, part).astype(np.float64)
        highest = logits.max(axis=-1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
        losses.append(total - logits[np.arange(len(part)), row.ids[part + 1]])
    return float(np.concatenate(losses) @ weights), float(weights.sum())


def grouped_losses(
    backend: Backend, rows: Sequence[Encoded], plan: Plan, seed: int, progress: Progress = lambda share, text: None
) -> np.ndarray:
    """[G, 2]: a Loss of each of at most 200 groups, drawn by `seed`: their rows are evaluated in micro-batches."""
    order = np.random.default_rng([seed, 4]).permutation(len(rows))
    found, done = [], 0
    for group in np.array_split(order, min(len(rows), _GROUPS)):
        batches = micro_batches([rows[int(row)] for row in group], plan.micro_batch_tokens, plan.device)
        results = [backend.eval_step(batch) for batch in batches]
        found.append((sum(float(r.loss_sum) for r in results), sum(r.weight_sum for r in results)))
        done += len(group)
        progress(done / len(rows), f"{done:,} of {len(rows):,} rows")
    return np.array(found)

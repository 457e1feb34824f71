"""Cross-entropy at label positions only, and without logits: no `tokens x vocabulary` array ever exists."""

from typing import Any

import mlx.core as mx
import numpy as np

from common.backend import IGNORE, Batch
from common.data.batching import split_batch
from mlx_backend.layers import Rows
from mlx_backend.model import finish, head_weight, hidden_states, project

_BLOCK = 256


def loss_sum(model: Any, batch: Batch, chunk: int) -> mx.array:
    """Sum of the token losses of a micro-batch, float32 scalar. `model` is load_base's.

    `chunk`: label positions whose logits are held at once.
    """
    total = mx.array(0.0)
    for part in split_batch(batch, model.facts.rope_split):
        real = np.arange(part.labels.shape[1]) < part.lengths[:, None]
        labels = part.labels[real]
        chosen = (labels != IGNORE).nonzero()[0]
        if len(chosen) == 0:
            continue
        places = None if real.all() else mx.array(real.ravel().nonzero()[0])
        hidden = hidden_states(model, mx.array(part.input_ids[real]), Rows(real.shape[0], real.shape[1], places))
        total = total + linear_cross_entropy(model, hidden[mx.array(chosen)], mx.array(labels[chosen]), chunk)
    return total


def linear_cross_entropy(model: Any, hidden: mx.array, labels: mx.array, chunk: int) -> mx.array:
    """`sum(-log softmax(head(hidden))[label])`, float32, of hidden [N, H] and labels [N], `chunk` logits at a time.

    In training each chunk's gradient is formed with its loss, so that its logits can be forgotten: what is kept for the
    backward pass has the shape of `hidden` (and of the head's weight, where that is trained).
    """

    pieces = [(start, min(start + chunk, len(hidden))) for start in range(0, len(hidden), chunk)]
    if not model.training:
        total = mx.array(0.0)
        for start, end in pieces:
            part, _ = mx.depends([hidden[start:end], total], [total])  # one chunk after the other
            total = total + _loss(*_logits(model, project(model, part))[:2], labels[start:end])
        return total
    weight = head_weight(model)
    inputs: list[Any] = [hidden] if weight is None else [hidden, weight]

    @mx.custom_function
    def with_gradients(*inputs: mx.array) -> list[mx.array]:
        total, weight_gradient = mx.array(0.0), mx.array(0.0)
        parts: list[mx.array] = []
        for start, end in pieces:
            # the chunk waits for the one before, or several would be alive together
            part = mx.depends([inputs[0][start:end]], [total, *parts[-1:], weight_gradient])[0]
            arguments, right = [part, *inputs[1:]], labels[start:end]
            raw = project(model, *arguments)
            logits, sums, derivative = _logits(model, raw)
            total = total + _loss(logits, sums, right)
            error = mx.exp(logits - sums[:, None])
            at_right = mx.take_along_axis(error, right[:, None], axis=-1)
            error = mx.put_along_axis(error, right[:, None], at_right - 1, axis=-1)
            if derivative is not None:
                error = error * derivative
            gradients: Any = mx.vjp(lambda *a: project(model, *a), arguments, [error.astype(raw.dtype)])[1]
            parts.append(gradients[0])
            if inputs[1:]:
                weight_gradient = weight_gradient + gradients[1].astype(mx.float32)
        return [total, mx.concatenate(parts), weight_gradient]

    @with_gradients.vjp
    def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return [
            (grad_output * cotangents[0]).astype(i.dtype) for grad_output, i in zip(outputs[1:], inputs, strict=False)
        ]

    outputs: Any = with_gradients(*inputs)
    return outputs[0]


def _logits(model: Any, raw: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
    """`(logits, the log of their exponentials' sum, their derivative by raw or None where that is 1)`."""
    logits = finish(model, raw)
    divisor, cap = model.facts.logit_divisor, model.facts.logit_softcap
    derivative = None
    if cap or divisor != 1.0:
        derivative = (1 - mx.square(logits / cap) if cap else mx.array(1.0)) / divisor
    return logits, log_sum_exp(logits), derivative


def _loss(logits: mx.array, sums: mx.array, right: mx.array) -> mx.array:
    return sums.sum() - mx.take_along_axis(logits, right[:, None], axis=-1).sum()


def log_sum_exp(logits: mx.array) -> mx.array:
    """Over the last axis of [N, vocabulary], in two stages: MLX's CPU adds one by one, and loses 1e-4 over 262k."""
    whole = logits.shape[-1] - logits.shape[-1] % _BLOCK
    parts = [mx.logsumexp(logits[:, :whole].reshape(len(logits), -1, _BLOCK), axis=-1)] if whole else []
    if whole < logits.shape[-1]:
        parts.append(mx.logsumexp(logits[:, whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)

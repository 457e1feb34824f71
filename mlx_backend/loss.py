"""Cross-entropy at label positions only, and without logits: no `tokens x vocabulary` array ever exists."""

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from common.backend import Batch
from common.memory_terms import MicroBatchShape
from mlx_backend.attention import RaggedRows
from mlx_backend.model import finish, head_weight, hidden_states, project

_BLOCK = 256


class Inputs(NamedTuple):
    """A micro-batch as the model takes it: N tokens, of which P are followed by a label, packed."""

    rows: int  # B
    width: int  # T
    ids: mx.array  # [N] int32
    indices: mx.array | None  # [N] int32: where the tokens belong among [B * T] positions; None: nothing is padded
    label_positions: mx.array  # [P] int32, among the tokens
    targets: mx.array  # [P] int32
    loss_weights: mx.array  # [P] float32

    @property
    def shape(self) -> MicroBatchShape:
        return MicroBatchShape(self.rows, self.width, len(self.ids), len(self.targets))


def inputs_of(batch: Batch, layout: MicroBatchShape) -> Inputs:
    """The micro-batch in a layout that holds it. What is added weighs nothing, and no token of the batch sees it.

    An added token is a position of padding; an added label has the weight 0.
    """
    real = np.zeros((layout.rows, layout.width), bool)
    real[: len(batch.lengths)] = np.arange(layout.width) < batch.lengths[:, None]
    given = real[: len(batch.lengths), : batch.targets.shape[1]]
    positions, whole = real.ravel().nonzero()[0], layout.tokens == real.size
    added = (~real).ravel().nonzero()[0][: layout.tokens - len(positions)]
    place = positions if whole else np.arange(len(positions))  # of each real token among those of the layout
    ids = np.zeros(layout.tokens, np.int32)
    ids[place] = batch.input_ids[given]
    loss_weights = batch.loss_weights[given]
    labels = loss_weights.nonzero()[0]
    arrays = place[labels].astype(np.int32), batch.targets[given][labels], loss_weights[labels]
    return Inputs(
        layout.rows,
        layout.width,
        mx.array(ids),
        None if whole else mx.array(np.concatenate([positions, added]).astype(np.int32)),
        *(mx.array(np.concatenate([a, np.zeros(layout.labels - len(a), a.dtype)])) for a in arrays),
    )


def loss_sum(model: Any, inputs: Inputs, chunk: int) -> mx.array:
    """Weighted sum of the token losses of a micro-batch, a float32 scalar. `model` is load_base's.

    chunk: label positions whose logits are held at once.
    """
    hidden = hidden_states(model, inputs.ids, RaggedRows(inputs.rows, inputs.width, inputs.indices))
    return linear_cross_entropy(model, hidden[inputs.label_positions], inputs.targets, inputs.loss_weights, chunk)


def linear_cross_entropy(
    model: Any, hidden: mx.array, targets: mx.array, loss_weights: mx.array, chunk: int
) -> mx.array:
    """`sum(-w * log softmax(head(hidden))[target])`, float32, the logits of `chunk` rows at a time.

    hidden [N, H], targets [N]; w: loss_weights [N], above 0.
    In training each chunk's gradient is computed with its loss, so that its logits can be freed: what is kept for the
    backward pass has the shape of `hidden` (and of the head's weight, where that is trained).
    """
    chunks = [(start, min(start + chunk, len(hidden))) for start in range(0, len(hidden), chunk)]
    if not model.training:
        total = mx.array(0.0)
        for start, end in chunks:
            part, _ = mx.depends([hidden[start:end], total], [total])  # one chunk after the other
            logits, sums, _ = _logits(model, project(model, part))
            total = total + _loss(logits, sums, targets[start:end], loss_weights[start:end])
        return total
    weight = head_weight(model)
    inputs: list[Any] = [hidden] if weight is None else [hidden, weight]

    @mx.custom_function
    def with_gradients(*inputs: mx.array) -> list[mx.array]:
        total, grad_weight = mx.array(0.0), mx.array(0.0)
        parts: list[mx.array] = []
        for start, end in chunks:
            # a chunk waits for the one before, or several would be held at once
            part = mx.depends([inputs[0][start:end]], [total, *parts[-1:], grad_weight])[0]
            arguments = [part, *inputs[1:]]
            loss, gradients = _loss_and_gradients(model, arguments, targets[start:end], loss_weights[start:end])
            total = total + loss
            parts.append(gradients[0])
            if inputs[1:]:
                grad_weight = grad_weight + gradients[1].astype(mx.float32)
        return [total, mx.concatenate(parts), grad_weight]

    @with_gradients.vjp
    def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return [(grad * cotangents[0]).astype(i.dtype) for grad, i in zip(outputs[1:], inputs, strict=False)]

    outputs: Any = with_gradients(*inputs)
    return outputs[0]


def _loss_and_gradients(
    model: Any, arguments: list[mx.array], targets: mx.array, loss_weights: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """`(a chunk's loss, its gradients by the arguments of project)`."""
    raw = project(model, *arguments)
    logits, sums, derivative = _logits(model, raw)
    error = mx.exp(logits - (sums - mx.log(loss_weights))[:, None])  # weighted without another array of logits
    at_target = mx.take_along_axis(error, targets[:, None], axis=-1)
    error = mx.put_along_axis(error, targets[:, None], at_target - loss_weights[:, None], axis=-1)
    if derivative is not None:
        error = error * derivative
    gradients: Any = mx.vjp(lambda *a: project(model, *a), arguments, [error.astype(raw.dtype)])[1]
    return _loss(logits, sums, targets, loss_weights), gradients


def _logits(model: Any, raw: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
    """`(logits, the log of the sum of their exponentials, their derivative by raw or None where that is 1)`."""
    logits = finish(model, raw)
    divisor, cap = model.forward_config.logit_divisor, model.forward_config.logit_softcap
    derivative = None
    if cap or divisor != 1.0:
        derivative = (1 - mx.square(logits / cap) if cap else mx.array(1.0)) / divisor
    return logits, log_sum_exp(logits), derivative


def _loss(logits: mx.array, sums: mx.array, targets: mx.array, loss_weights: mx.array) -> mx.array:
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (sums * loss_weights).sum() - (at_target * loss_weights).sum()


def log_sum_exp(logits: mx.array) -> mx.array:
    """Over the last axis of [N, vocabulary], in two stages: MLX's CPU sums one by one, and loses 1e-4 over 262k."""
    blocks = logits.shape[-1] - logits.shape[-1] % _BLOCK  # what divides into blocks
    parts = [mx.logsumexp(logits[:, :blocks].reshape(len(logits), -1, _BLOCK), axis=-1)] if blocks else []
    if blocks < logits.shape[-1]:
        parts.append(mx.logsumexp(logits[:, blocks:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)

"""The gated delta rule in chunks of a row, with a backward pass written by hand that keeps its inputs only.

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464). Of each head, with a state S [Dk, Dv] of
zeros at first, token by token: S = exp(decay) S; S = S + k (beta (v - S^T k))^T; output = S^T q. Within a chunk that is
a triangular system (Yang et al. 2024, arXiv:2406.06484): only the states follow each other, one for each chunk. Token
by token, which is what mlx-lm trains, every token's state is kept.
"""

from typing import Any

import mlx.core as mx

from common.memory_terms import key_heads_at_once

CHUNK = 64  # tokens, a power of two


def gated_delta(parts: list[mx.array], state: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """`(outputs [B, Hv, T, Dv], the state after the last token [B, Hv, Dk, Dv])`, both float32.

    parts: queries and keys [B, Hk, T, Dk], where Hk divides Hv, and each serves as many heads in a row; values
    [B, Hv, T, Dv]; decay, its logarithm, at most 0, and beta [B, Hv, T]. state: before the first token; None: zeros.
    """
    values = parts[2]
    batch, heads, length, width = values.shape
    if state is None:
        state = mx.zeros((batch, heads, parts[0].shape[-1], width), mx.float32)
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    missing = -length % chunk  # tokens with a beta and a decay of 0 leave the state as it is
    cut = []
    for part in parts:
        padded = mx.pad(part, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (part.ndim - 3)) if missing else part
        cut.append(padded.reshape(*part.shape[:2], -1, chunk, *part.shape[3:]))
    found: Any = _chunks(state, *cut)
    outputs, state = found
    return outputs.reshape(batch, heads, -1, width)[:, :, :length], state


@mx.custom_function
def _chunks(state: mx.array, *parts: mx.array) -> tuple[mx.array, mx.array]:
    """`gated_delta` of parts in N chunks of C tokens: [B, H, N, C, ...]."""
    outputs, after = _by_groups(_outputs, state, *parts)
    return outputs, after


@_chunks.vjp
def _chunks_vjp(primals: Any, cotangents: Any, outputs: Any) -> list[mx.array]:
    grads = _by_groups(_grads, *primals, *cotangents)
    return [grad.astype(primal.dtype) for grad, primal in zip(grads, primals, strict=True)]


def _by_groups(compute: Any, *arrays: mx.array) -> list[mx.array]:
    """What `compute` makes of the arrays, the state and the parts first, a group of heads after the other."""
    _, queries, _, values, *_ = arrays
    count, repeats = queries.shape[1], values.shape[1] // queries.shape[1]
    size = repeats * values[:, 0, ..., 0].size * max(queries.shape[-1], values.shape[-1])
    heads = key_heads_at_once(size, count)
    found: list[Any] = []
    for start in range(0, count, heads):
        some = [a[:, start * (a.shape[1] // count) : (start + heads) * (a.shape[1] // count)] for a in arrays]
        found.append(compute(*(mx.depends(some, found[-1]) if found else some)))
    return found[0] if len(found) == 1 else [mx.concatenate(list(some), axis=1) for some in zip(*found, strict=True)]


class _System:
    """What the forward and the backward pass share: each chunk's triangular system, and the state before it."""

    def __init__(self, state: mx.array, *parts: mx.array) -> None:
        queries, keys, self.values, decay, beta = (part.astype(mx.float32) for part in parts)
        self.repeats = self.values.shape[1] // keys.shape[1]
        self.queries, self.keys = (mx.repeat(part, self.repeats, axis=1) for part in (queries, keys))
        since, self.beta = mx.cumsum(decay, axis=-1), beta[..., None]
        self.grown = mx.exp(since)[..., None]  # the decay since the chunk began, [..., C, 1]
        self.left = mx.exp(since[..., -1:] - since)[..., None]  # and until it ends
        self.last = self.grown[..., -1:, :]
        positions = mx.arange(since.shape[-1])
        distance = positions[:, None] - positions
        self.between = mx.exp(mx.where(distance >= 0, since[..., :, None] - since[..., None, :], -mx.inf))
        self.weighted, self.turned = self.keys * self.beta, self.keys.swapaxes(-1, -2)
        self.below = distance > 0
        self.alike = self.weighted @ self.turned
        self.inverse = _inverse(mx.where(self.below, self.alike * self.between, 0))
        self.seen = self.queries @ self.turned
        self.reads = self.inverse @ (self.weighted * self.grown)  # of the state before
        self.writes = (self.keys * self.left).swapaxes(-1, -2)  # into the state after
        own, states = self.inverse @ (self.values * self.beta), [state]
        for i in range(own.shape[2]):
            new = own[:, :, i] - self.reads[:, :, i] @ states[-1]
            states.append(states[-1] * self.last[:, :, i] + self.writes[:, :, i] @ new)
        self.after = states.pop()
        self.states = mx.stack(states, axis=2)
        self.new = own - self.reads @ self.states


@mx.compile
def _outputs(state: mx.array, *parts: mx.array) -> tuple[mx.array, mx.array]:
    s = _System(state, *parts)
    return (s.queries * s.grown) @ s.states + (s.seen * s.between) @ s.new, s.after


@mx.compile
def _grads(state: mx.array, *given: mx.array) -> list[mx.array]:
    """The gradients of the state and the parts. given: the parts, and the gradients of the outputs and the last state.

    The names are those of `_System`; `right` is the right side of its equation for `new`.
    """
    *parts, grad, grad_after = given
    s = _System(state, *parts)
    grad_new = (s.seen * s.between).swapaxes(-1, -2) @ grad  # without what the states after take of it
    reads = s.reads.swapaxes(-1, -2)
    direct = (s.queries * s.grown).swapaxes(-1, -2) @ grad - reads @ grad_new
    later = [grad_after]
    for i in reversed(range(grad.shape[2])):
        left = s.writes[:, :, i].swapaxes(-1, -2) @ later[-1]
        later.append(direct[:, :, i] + s.last[:, :, i] * later[-1] - reads[:, :, i] @ left)
    before = later.pop()
    grad_states = mx.stack(later[::-1], axis=2)  # of the state after each chunk
    grad_right = s.inverse.swapaxes(-1, -2) @ (grad_new + s.writes.swapaxes(-1, -2) @ grad_states)
    turned, states = s.new.swapaxes(-1, -2), s.states.swapaxes(-1, -2)
    lower = mx.where(s.below, -(grad_right @ turned) * s.between, 0)
    seen = (grad @ turned) * s.between
    asked, kept, written = grad @ states, grad_right @ states, s.new @ grad_states.swapaxes(-1, -2)
    grad_weighted = lower @ s.keys - kept * s.grown
    grad_queries = asked * s.grown + seen @ s.keys
    grad_keys = seen.swapaxes(-1, -2) @ s.queries + lower.swapaxes(-1, -2) @ s.weighted
    grad_keys = grad_keys + grad_weighted * s.beta + written * s.left
    grad_beta = (grad_right * s.values).sum(-1) + (grad_weighted * s.keys).sum(-1)
    pairs, ends = seen * s.seen + lower * s.alike, (written * s.keys * s.left).sum(-1)
    since = pairs.sum(-1) - pairs.sum(-2) + (s.grown * (asked * s.queries - kept * s.weighted)).sum(-1) - ends
    last = ends.sum(-1, keepdims=True) + (s.last * s.states * grad_states).sum((-1, -2))[..., None]
    grad_decay = mx.cumsum(since, axis=-1, reverse=True) + last
    grad_queries, grad_keys = (
        part.reshape(part.shape[0], -1, s.repeats, *part.shape[2:]).sum(2) for part in (grad_queries, grad_keys)
    )
    return [before, grad_queries, grad_keys, grad_right * s.beta, grad_decay, grad_beta]


def _inverse(lower: mx.array) -> mx.array:
    """Of 1 + `lower` [..., C, C], which is strictly lower triangular; C is a power of two.

    By halves: blocks on the diagonal that are inverted give those of twice their size. As exact as substitution, where
    a sum of powers would cancel large terms.
    """
    count = lower.shape[-1]
    inverse = mx.ones((*lower.shape[:-2], count, 1, 1), lower.dtype)
    size = 1
    while size < count:
        blocks = lower.reshape(*lower.shape[:-2], count // size, size, count // size, size)
        below = mx.stack([blocks[..., i + 1, :, i, :] for i in range(0, count // size, 2)], axis=-3)
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate([top, mx.concatenate([-(second @ below @ first), second], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]

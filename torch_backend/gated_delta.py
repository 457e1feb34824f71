"""The gated delta rule in chunks of a row, with a backward pass written by hand that keeps its inputs only.

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464). Of each head, with a state S [Dk, Dv] of
zeros at first, token by token: S = exp(decay) S; S = S + k (beta (v - S^T k))^T; output = S^T q. Within a chunk that is
a triangular system (Yang et al. 2024, arXiv:2406.06484): only the states follow each other, one for each chunk.
transformers computes it so too, and keeps all that autograd wants of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from common.memory_terms import key_heads_at_once

CHUNK = 64  # tokens


class GatedDelta(torch.autograd.Function):
    """Outputs [B, Hv, T, Dv], float32, for queries and keys [B, Hk, T, Dk], values [B, Hv, T, Dv], decay and beta.

    Hk divides Hv, and each key head serves as many heads in a row. decay, its logarithm, at most 0, and beta are
    [B, Hv, T]. Kept for the backward pass: these, in their own types.
    """

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parts)
        return gated_delta(parts)[0]

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups, parts = [], ctx.saved_tensors
        for *some, state, grad in _groups(*parts, _zero_state(parts), outputs[0]):
            grads = _System(some, state).grads(_cut(grad).float())
            groups.append([_joined(grad, part).to(part.dtype) for grad, part in zip(grads, some, strict=True)])
        return tuple(torch.cat(found, 1) for found in zip(*groups, strict=True))


def gated_delta(
    parts: tuple[torch.Tensor, ...], state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(outputs, the state after the last token [B, Hv, Dk, Dv])`. state: before the first token; None: zeros."""
    groups = []
    for *some, before in _groups(*parts, _zero_state(parts) if state is None else state):
        system = _System(some, before)
        groups.append((_joined(system.outputs(), some[2]), system.after))
    outputs, states = (torch.cat(found, 1) for found in zip(*groups, strict=True))
    return outputs, states


def _zero_state(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    queries, _, values, *_ = parts
    return values.new_zeros((*values.shape[:2], queries.shape[-1], values.shape[-1]), dtype=torch.float32)


def _groups(*arrays: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The arrays, the parts first, by groups of heads that are computed at once."""
    queries, _, values, *_ = arrays
    count, repeats = queries.shape[1], values.shape[1] // queries.shape[1]
    size = repeats * values.shape[0] * values.shape[2] * max(queries.shape[-1], values.shape[-1])
    heads = key_heads_at_once(size, count)
    return zip(*(array.split(heads * array.shape[1] // count, 1) for array in arrays), strict=True)


def _cut(part: torch.Tensor) -> torch.Tensor:
    """[B, H, T, ...] in N chunks: [B, H, N, C, ...]. Tokens of zeros are added, which leave the state as it is."""
    chunk = min(CHUNK, part.shape[2])
    missing = -part.shape[2] % chunk
    return torch.nn.functional.pad(part, [0, 0] * (part.dim() - 3) + [0, missing]).unflatten(2, (-1, chunk))


def _joined(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return part.flatten(2, 3)[:, :, : like.shape[2]]


class _System:
    """What the forward and the backward pass share: each chunk's triangular system, and the state before it."""

    def __init__(self, parts: Sequence[torch.Tensor], state: torch.Tensor) -> None:
        queries, keys, self.values, decay, beta = (_cut(part).float() for part in parts)
        self.repeats = self.values.shape[1] // keys.shape[1]
        self.queries, self.keys = (part.repeat_interleave(self.repeats, 1) for part in (queries, keys))
        since, self.beta = decay.cumsum(-1), beta[..., None]
        self.grown = since.exp()[..., None]  # the decay since the chunk began, [..., C, 1]
        self.left = (since[..., -1:] - since).exp()[..., None]  # and until it ends
        self.last = self.grown[..., -1:, :]
        later = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool, device=since.device).triu(1)
        self.between = (since[..., :, None] - since[..., None, :]).masked_fill_(later, float("-inf")).exp_()
        self.weighted = self.keys * self.beta
        self.alike = self.weighted @ self.keys.mT
        self.system = (self.alike * self.between).tril_(-1)
        self.seen = self.queries @ self.keys.mT
        self.reads = self._solved(self.weighted * self.grown)  # of the state before
        self.writes = (self.keys * self.left).mT  # into the state after
        own = self._solved(self.values * self.beta)
        states = [state]
        for i in range(own.shape[2]):
            new = own[:, :, i] - self.reads[:, :, i] @ states[-1]
            states.append(states[-1] * self.last[:, :, i] + self.writes[:, :, i] @ new)
        self.after = states.pop()
        self.states = torch.stack(states, 2)
        self.new = own - self.reads @ self.states

    def _solved(self, right: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def outputs(self) -> torch.Tensor:
        return (self.queries * self.grown) @ self.states + (self.seen * self.between) @ self.new

    def grads(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of the five parts, for that of the outputs. `right` is the right side of the system's equation.

        The other names are those of the system.
        """
        grad_new = (self.seen * self.between).mT @ grad  # without what the states after take of it
        direct = (self.queries * self.grown).mT @ grad - self.reads.mT @ grad_new
        later = [torch.zeros_like(self.states[:, :, 0])]
        for i in reversed(range(1, grad.shape[2])):
            left = self.writes[:, :, i].mT @ later[-1]
            later.append(direct[:, :, i] + self.last[:, :, i] * later[-1] - self.reads[:, :, i].mT @ left)
        grad_states = torch.stack(later[::-1], 2)  # of the state after each chunk
        grad_new = grad_new + self.writes.mT @ grad_states
        grad_right = torch.linalg.solve_triangular(self.system.mT, grad_new, upper=True, unitriangular=True)
        lower = (-(grad_right @ self.new.mT) * self.between).tril_(-1)
        seen = (grad @ self.new.mT) * self.between
        asked, kept = grad @ self.states.mT, grad_right @ self.states.mT
        written = self.new @ grad_states.mT
        grad_weighted = lower @ self.keys - kept * self.grown
        grad_queries = asked * self.grown + seen @ self.keys
        grad_keys = seen.mT @ self.queries + lower.mT @ self.weighted + grad_weighted * self.beta + written * self.left
        grad_beta = (grad_right * self.values).sum(-1) + (grad_weighted * self.keys).sum(-1)
        pairs, ends = seen * self.seen + lower * self.alike, (written * self.keys * self.left).sum(-1)
        since = pairs.sum(-1) - pairs.sum(-2) - ends
        since += (self.grown * (asked * self.queries - kept * self.weighted)).sum(-1)
        last = ends.sum(-1, keepdim=True) + (self.last * self.states * grad_states).sum((-1, -2))[..., None]
        grad_decay = since.flip(-1).cumsum(-1).flip(-1) + last
        queries, keys = (g.unflatten(1, (-1, self.repeats)).sum(2) for g in (grad_queries, grad_keys))
        return [queries, keys, grad_right * self.beta, grad_decay, grad_beta]

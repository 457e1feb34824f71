"""AdamW over the tensors of the trained parameters, in groups that differ in learning rate or weight decay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.optimizers as optim

from common.recipe import Recipe
from mlx_backend.trained import Tensors

State = dict[str, Any]  # AdamW's of a group: step, learning_rate, and by number of the tensor its moments m and v


@dataclass(frozen=True)
class _Group:
    adamw: Any
    ratio: float  # of its learning rate to the recipe's
    tensors: list[int]


class Optimizer:
    """Functions without a state of their own: what a step changes is given and returned."""

    def __init__(self, recipe: Recipe, settings: Sequence[tuple[float, float]], group: Sequence[int]) -> None:
        """settings: `(ratio, weight decay)` of each group. group: that of each tensor."""
        self.max_grad_norm = recipe.max_grad_norm
        self.groups = [
            _Group(_adamw(recipe, decay), ratio, [at for at, number in enumerate(group) if number == mine])
            for mine, (ratio, decay) in enumerate(settings)
        ]

    def states(self, tensors: Tensors) -> list[State]:
        """Before the first step."""
        zeros = [mx.zeros_like(tensor) for tensor in tensors]
        return self.states_of(0, zeros, zeros)

    def states_of(self, step: int, m: Tensors, v: Tensors) -> list[State]:
        return [
            {"step": mx.array(step, mx.uint64), **{str(at): {"m": m[at], "v": v[at]} for at in group.tensors}}
            for group in self.groups
        ]

    def moments(self, states: list[State], which: Literal["m", "v"]) -> Tensors:
        """One of AdamW's moments, of each tensor."""
        found = {
            at: state[str(at)][which] for group, state in zip(self.groups, states, strict=True) for at in group.tensors
        }
        return [found[at] for at in sorted(found)]

    def update(
        self, tensors: Tensors, states: list[State], gradients: Tensors, weight: mx.array, learning_rate: mx.array
    ) -> tuple[Tensors, list[State], mx.array]:
        """`(tensors, states, the global norm of the gradients before clipping)` after a step.

        gradients: of the sum of losses. weight: of the step's labels, by which that sum is divided.
        """
        gradients = [gradient / weight for gradient in gradients]
        norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients), mx.array(0.0)))
        if self.max_grad_norm:
            factor = mx.minimum(1.0, self.max_grad_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
            gradients = [gradient * factor for gradient in gradients]
        tensors, after = [*tensors], []
        for group, state in zip(self.groups, states, strict=True):
            group.adamw.state = {**state, "learning_rate": learning_rate * group.ratio}
            for at in group.tensors:  # AdamW puts the next moments into what it is given
                group.adamw.state[str(at)] = {**state[str(at)]}
            changed = group.adamw.apply_gradients(
                *({str(at): some[at] for at in group.tensors} for some in (gradients, tensors))
            )
            for at in group.tensors:
                tensors[at] = changed[str(at)]
            after.append({key: value for key, value in group.adamw.state.items() if key != "learning_rate"})
            group.adamw.state = {}
        return tensors, after, norm


def _adamw(recipe: Recipe, weight_decay: float) -> optim.AdamW:
    return optim.AdamW(
        recipe.learning_rate,
        betas=[recipe.beta1, recipe.beta2],
        eps=recipe.epsilon,
        weight_decay=weight_decay,
        bias_correction=True,  # off by default, unlike in every other AdamW
    )

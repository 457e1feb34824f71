"""AdamW over the trained parameters, in groups that differ in learning rate or weight decay."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from common.backend import OptimizerState
from common.recipe import Recipe
from mlx_backend.weights import to_mlx, to_numpy


@dataclass(frozen=True)
class _Group:
    adamw: Any
    ratio: float  # of its learning rate to the recipe's
    paths: set[str]  # of its parameters in the model


@dataclass(frozen=True)
class Kept:
    """What was before a step."""

    parameters: Any  # the model's trained ones, as a tree
    states: list[Any]  # AdamW's, of each group


class Optimizer:
    """AdamW of the parameters in `paths`: their canonical name -> their path in the model."""

    def __init__(self, paths: dict[str, str], recipe: Recipe) -> None:
        self.names, self.recipe = {path: name for name, path in paths.items()}, recipe
        self.groups = [
            _Group(self._adamw(decay), ratio, {paths[name] for name in names})
            for names, ratio, decay in recipe.optimizer_groups(paths)
        ]

    def _adamw(self, weight_decay: float) -> optim.AdamW:
        recipe = self.recipe
        return optim.AdamW(
            recipe.learning_rate,
            betas=[recipe.beta1, recipe.beta2],
            eps=recipe.epsilon,
            weight_decay=weight_decay,
            bias_correction=True,  # off by default, unlike in every other AdamW
        )

    def keep(self, model: Any) -> Kept:
        """Weights and moments as they are: references, no copies."""
        return Kept(model.trainable_parameters(), self.states())

    def states(self) -> list[Any]:
        """AdamW's, of each group: trees of their own, because AdamW puts the next step's arrays into its own."""
        return [tree_map(lambda x: x, group.adamw.state) for group in self.groups]

    def restore(self, model: Any, kept: Kept) -> None:
        model.update(kept.parameters)
        for group, state in zip(self.groups, kept.states, strict=True):
            group.adamw.state = state

    def step(self, model: Any, kept: Kept, gradients: Any, learning_rate: float, max_grad_norm: float) -> mx.array:
        """Clip and update `model`, all of it lazily; the global norm of the gradients before clipping."""
        gradients, norm = _clipped(gradients, max_grad_norm)
        flat, trained = dict(tree_flatten(gradients)), dict(tree_flatten(kept.parameters))
        for group in self.groups:
            of_group = ({path: tree[path] for path in group.paths} for tree in (flat, trained))
            group.adamw.learning_rate = learning_rate * group.ratio
            model.update(tree_unflatten(list(group.adamw.apply_gradients(*of_group).items())))
        return norm

    def get(self) -> OptimizerState:
        moments: dict[str, dict[str, np.ndarray]] = {"m": {}, "v": {}}
        for group in self.groups:
            for path in group.paths:
                for moment, found in moments.items():
                    found[self.names[path]] = to_numpy(self.names[path], group.adamw.state[path][moment])
        step = int(self.groups[0].adamw.state["step"].item())
        return OptimizerState(step, moments["m"], moments["v"])

    def set(self, state: OptimizerState) -> None:
        for group in self.groups:
            content: dict[str, Any] = {path: self._moments(self.names[path], state) for path in group.paths}
            content["step"] = mx.array(state.step, mx.uint64)
            content["learning_rate"] = mx.array(self.recipe.learning_rate)
            group.adamw.state = content

    def _moments(self, name: str, state: OptimizerState) -> dict[str, mx.array]:
        return {"m": to_mlx(name, state.exp_avg[name]), "v": to_mlx(name, state.exp_avg_sq[name])}


def _clipped(gradients: Any, max_norm: float) -> tuple[Any, mx.array]:
    """`(the gradients, scaled down to a global norm of max_norm where that is not 0; their norm before)`."""
    norm = mx.sqrt(sum((mx.square(g).sum() for _, g in tree_flatten(gradients)), mx.array(0.0)))
    if max_norm:
        factor = mx.minimum(1.0, max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        gradients = tree_map(lambda g: g * factor, gradients)
    return gradients, norm

"""AdamW over the trained parameters; an adapter's matrices are views of few tensors, so that a few kernels suffice."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from common.backend import OptimizerState
from common.recipe import Recipe
from torch_backend.linear import Copies, LoraGroup
from torch_backend.model import DTYPES
from torch_backend.shards import assign, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW of parameters by canonical name, which inside are parts of `tensors`."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], recipe: Recipe, layers: Sequence[LoraGroup], join: bool
    ) -> None:
        """layers: that read copies of the parameters. join: those of a group become views of one tensor."""
        self.parameters, self.joined = parameters, join
        self.parts: dict[str, tuple[torch.nn.Parameter, int]] = {}  # by name: the tensor, and where the part begins
        groups = []
        for names, ratio, decay in recipe.optimizer_groups(parameters):
            chosen = [parameters[name] for name in names]
            parts = _join(chosen) if join else [(parameter, 0) for parameter in chosen]
            self.parts |= dict(zip(names, parts, strict=True))
            tensors = list({id(tensor): tensor for tensor, _ in parts}.values())
            groups.append({"params": tensors, "ratio": ratio, "weight_decay": decay})
        self.adamw = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.epsilon,
            fused=True,
        )
        self.tensors = [tensor for group in self.adamw.param_groups for tensor in group["params"]]
        for tensor in self.tensors:  # now and not in the first step, which could not be repeated
            self.adamw.state[tensor] = {
                "step": torch.zeros((), device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }
        self.copies = Copies(layers, DTYPES[recipe.precision])

    def zero_grad(self) -> None:
        """Clear the gradients; those of joined parameters keep their memory."""
        self.adamw.zero_grad(set_to_none=not self.joined)

    def gradients(self) -> list[torch.Tensor]:
        """Of `tensors`; zeros where none was accumulated."""
        for tensor in self.tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return [tensor.grad for tensor in self.tensors if tensor.grad is not None]

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        """Clip and step; the global norm of the gradients before clipping, a scalar on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self.tensors, max_grad_norm or float("inf"))
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self.adamw.step()
        self.copies.refresh()
        return whole(norm)

    @property
    def steps(self) -> int:
        """That were taken; waits for the device."""
        return int(self.adamw.state[self.tensors[0]]["step"])

    @torch.no_grad()
    def set(self, state: OptimizerState) -> None:
        for tensor in self.tensors:
            self.adamw.state[tensor]["step"].fill_(state.step)
        for kind, arrays in zip(MOMENTS, (state.exp_avg, state.exp_avg_sq), strict=True):
            for name in self.parts:
                assign(self.moment(kind, name), torch.from_numpy(arrays[name]))

    def moment(self, kind: str, name: str) -> torch.Tensor:
        """A view of the parameter's part of one of AdamW's moments."""
        tensor, start = self.parts[name]
        moment: torch.Tensor = self.adamw.state[tensor][kind]
        if not self.joined:
            return moment
        shape = self.parameters[name].shape
        return moment.view(-1)[start : start + shape.numel()].view(shape)


def _join(parameters: Sequence[torch.nn.Parameter]) -> list[tuple[torch.nn.Parameter, int]]:
    """One tensor that holds them all, and where each begins; they and their gradients become views of it."""
    joined = torch.nn.Parameter(torch.cat([p.data.flatten() for p in parameters]))
    joined.grad = torch.zeros_like(joined)
    parts, start = [], 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = joined.data[start:end].view_as(parameter)
        parameter.grad = joined.grad[start:end].view_as(parameter)
        parts.append((joined, start))
        start = end
    return parts


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A float32 copy on the CPU. Of a sharded tensor rank 0 alone has it, and the others a single zero."""
    found = whole(tensor.detach())
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_rank():
        return np.broadcast_to(np.zeros((), np.float32), tuple(tensor.shape))
    return found.to("cpu", torch.float32, copy=True).numpy()

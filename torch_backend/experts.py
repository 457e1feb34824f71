"""The experts of a mixture, which transformers keeps in two tensors a layer: gate and up in one, down.

PEFT's own layer would add B @ A to all experts' weights in every forward pass. Here the rows that come to an expert go
through its weights, and through its A and B.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional

from common.backend import LoraWeight
from common.models.experts import MATRICES, Choices, expert_names

_PLAIN = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}


def expert_shapes(module: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of each expert's matrices, by name within the experts; none of what `LoraExperts` cannot adapt."""
    settings = {name: getattr(module, name, None) for name in (*_PLAIN, "has_post_expert_norm")}
    if settings != _PLAIN | {"has_post_expert_norm": False} or module.gate_up_proj.ndim != 3:
        return {}
    count, doubled, hidden = module.gate_up_proj.shape
    inner = doubled // 2
    each = dict(zip(MATRICES, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    return {f"{number}.{matrix}": shape for matrix, shape in each.items() for number in range(count)}


@contextmanager
def counted(model: Any) -> Iterator[Choices]:
    """Within it, what the model's routers choose is counted. Transformers gives a layer's experts the choice."""
    choices = Choices()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            experts = getattr(getattr(module, "base_layer", module), "num_experts", None)
            if name.endswith(".experts") and "layers." in name and experts:
                hook = partial(_count, choices.of(name, experts))
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield choices


def _count(count: Callable[[np.ndarray], None], module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """The choice is what is given in whole numbers."""
    for some in (*given, *named.values()):
        if isinstance(some, torch.Tensor) and some.dtype in (torch.int32, torch.int64):
            count(some.cpu().numpy())
            return


class LoraExperts(torch.nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT has no types
    """In place of transformers' experts; PEFT switches it on and off, and takes it out, as its own layers."""

    adapter_layer_names = ("lora_experts",)

    def __init__(self, base: Any, adapter: str, path: str, weights: Mapping[str, LoraWeight], dropout: float) -> None:
        """path: what the experts' names in `weights` begin with. The matrices are zeros."""
        super().__init__()
        self.base_layer, self.dropout = base, dropout
        names = {matrix: expert_names(f"{path}.{matrix}", base.num_experts) for matrix in MATRICES}
        self.scales = {matrix: weights[some[0]].scale for matrix, some in names.items()}
        self.lora_experts = torch.nn.ModuleDict({adapter: torch.nn.ModuleDict()})
        for matrix, some in names.items():
            parts = {part: [torch.zeros(weights[name].parts()[part].shape) for name in some] for part in _PARTS}
            self.lora_experts[adapter][matrix] = torch.nn.ModuleDict(
                {part: torch.nn.ParameterList(zeros) for part, zeros in parts.items()}
            )

    def parameters_of(self, path: str) -> dict[str, torch.nn.Parameter]:
        """The trained matrices by canonical name."""
        return {
            f"{name}.{part}": parameter
            for matrix in MATRICES
            for part in _PARTS
            for name, parameter in zip(
                expert_names(f"{path}.{matrix}", self.base_layer.num_experts), self._matrices(matrix, part), strict=True
            )
        }

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum [tokens, H] of what its experts make of each token. chosen: their numbers [tokens, K]."""
        if self.disable_adapters:
            found: torch.Tensor = self.base_layer(hidden, chosen, weights)
            return found
        flat, each = chosen.flatten(), chosen.shape[-1]
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.base_layer.num_experts).tolist()
        rows = hidden[order // each].split(counts)
        out = torch.cat([self._expert(number, some) for number, some in enumerate(rows) if len(some)])
        out = out * weights.flatten()[order, None]
        return out[order.argsort()].view(*chosen.shape, -1).sum(dim=1).to(hidden.dtype)

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        added = torch.cat([self._added(matrix, number, rows) for matrix in MATRICES[:2]], dim=-1)
        inner = base._apply_gate(functional.linear(rows, base.gate_up_proj[number]) + added.to(rows.dtype))
        return functional.linear(inner, base.down_proj[number]) + self._added("down_proj", number, inner).to(rows.dtype)

    def _added(self, matrix: str, number: int, rows: torch.Tensor) -> torch.Tensor:
        A, B = (self._matrices(matrix, part)[number] for part in _PARTS)
        dropped = functional.dropout(rows.to(A.dtype), self.dropout, self.training)
        return functional.linear(functional.linear(dropped, A), B) * self.scales[matrix]

    def _matrices(self, matrix: str, part: str) -> Any:
        return self.lora_experts[self.active_adapters[0]][matrix][part]


_PARTS = ("lora_A", "lora_B")

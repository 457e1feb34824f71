"""Experts of a mixture: an adapter names each one's matrices, as the model's files do; libraries stack them."""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from common.backend import LoraWeight
from common.errors import UserError
from common.models.families import mlx_name
from common.option_fields import EXPERTS

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of each expert
_ANY = "|".join(MATRICES)
_EXPERT = re.compile(rf"(.+\.experts)\.(\d{{1,9}})\.({_ANY})")
_STACK = re.compile(rf"(.*)\.experts\.({_ANY})")
_UNKNOWN_TO_PEFT = ("laguna", "qwen2_moe")
_COUNTED = "Nothing need be done: only the load of the experts is not reported."
_MLX_STACK = re.compile(rf"(.*)\.switch_mlp\.({_ANY})")


def target_of(module: str) -> str:
    """What --targets calls the module: the last part of its name, or `experts`."""
    return EXPERTS if _EXPERT.fullmatch(module) else module.rsplit(".", 1)[-1]


def stack_of(module: str) -> str:
    """`mlp.experts.gate_proj` of `mlp.experts.7.gate_proj`; the name of any other module as it is."""
    return _EXPERT.sub(r"\1.\3", module)


def has_experts(modules: Iterable[str]) -> bool:
    return any(target_of(module) == EXPERTS for module in modules)


def mixture_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the tensors that hold experts, in whatever form; none of a model without a mixture."""
    return [name for name, shape in shapes.items() if ".experts." in name or ("moe" in name and len(shape) == 3)]


def left_out_by_peft(kind: str, modules: Iterable[str]) -> bool:
    """Whether PEFT 0.21.2 loads a part of an adapter of these modules of a mixture, or nothing. kind: the model type.

    It takes gate_proj, up_proj and down_proj for the experts' wherever they are. Of some kinds it knows no experts.
    """
    return has_experts(modules) if kind in _UNKNOWN_TO_PEFT else any(target_of(name) in MATRICES for name in modules)


class Choices:
    """How often each expert is chosen by its router, layer by layer, in rows that a library's layers compute."""

    def __init__(self) -> None:
        self._counts: dict[int, np.ndarray] = {}

    def of(self, module: str, experts: int) -> Callable[[np.ndarray], None]:
        """A function that counts what is chosen [tokens, K] in the mixture that has this name in the library's model.

        Raises UserError for a second mixture in a layer.
        """
        layer = int(module.split("layers.", 1)[1].split(".")[0])
        if layer in self._counts:
            raise UserError(f"layer {layer} has more than one mixture of experts", _COUNTED)
        counts = self._counts[layer] = np.zeros(experts, np.int64)

        def count(chosen: np.ndarray) -> None:
            counts[:] += np.bincount(chosen.ravel(), minlength=experts)[:experts]  # beyond: a token for none of them

        return count

    def complete(self) -> dict[int, np.ndarray]:
        """Counts [experts] by layer. Raises UserError where a mixture did not say what it chose."""
        if not self._counts:
            raise UserError("the library's layers name no experts that a router chooses", _COUNTED)
        if silent := [layer for layer, counts in self._counts.items() if not counts.any()]:
            raise UserError(f"the mixture in layer {silent[0]} does not say which experts it chooses", _COUNTED)
        return dict(sorted(self._counts.items()))


def by_stack(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules by `stack_of`, an expert's in the order of its number."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(stack_of(module), []).append(module)
    return {stack: sorted(members, key=_number) for stack, members in found.items()}


def expert_names(stack: str, count: int) -> list[str]:
    """The names of the experts' matrices in `mlp.experts.gate_proj`."""
    experts, _, matrix = stack.rpartition(".")
    return [f"{experts}.{number}.{matrix}" for number in range(count)]


def is_complete(stack: str, members: list[str]) -> bool:
    """Whether `by_stack`'s members are all experts up to the last of them, or the module itself."""
    return members in ([stack], expert_names(stack, len(members)))


def mlx_stack(name: str) -> str:
    """The module of mlx-lm that holds a stack; other names as they are."""
    return _STACK.sub(r"\1.switch_mlp.\2", name)


def stack_in_mlx(name: str) -> str | None:
    """The stack that this module of mlx-lm holds; None of any other module."""
    found = _MLX_STACK.fullmatch(name)
    return f"{found[1]}.experts.{found[2]}" if found else None


def uneven(weights: Mapping[str, LoraWeight]) -> list[str]:
    """What no library can compute of an adapter's experts: those of a layer share ranks and scales."""
    faults, stacks = [], by_stack(weights)
    for stack, members in stacks.items():
        if len({(weights[name].rank, weights[name].scale) for name in members}) > 1:
            faults.append(f"{stack}: its experts differ in rank or scale")
        if members == [stack]:
            continue
        if any(weights[name].magnitude is not None for name in members):
            faults.append(f"{stack}: DoRA of experts is not computed")
        layer = stack.rpartition(".")[0]
        if lacking := [name for name in MATRICES if f"{layer}.{name}" not in stacks]:
            faults.append(f"{layer}: {lacking[0]} of its experts is not adapted, and other matrices are")
        if not is_complete(stack, members):
            faults.append(f"{stack}: some of its experts are not adapted")
    return faults


def _number(module: str) -> int:
    found = _EXPERT.fullmatch(module)
    return int(found[2]) if found else 0


def stacked_in_mlx(tensors: dict[str, np.ndarray], stacks: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The tensors under mlx-lm's names, which stacks those of experts: A [experts, r, in], B [experts, out, r]."""
    found = {}
    for stack, members in stacks.items():
        if not is_complete(stack, members):
            raise UserError(f"{stack}: the adapter has no matrices of some experts.", "Keep it in PEFT's layout.")
        for part in ("lora_a", "lora_b", "m"):
            some = [tensors[f"{name}.{part}"] for name in members if f"{name}.{part}" in tensors]
            if some:
                joined = some[0] if members == [stack] else np.stack([matrix.T for matrix in some])
                found[f"{mlx_name(mlx_stack(stack))}.{part}"] = joined
    return found

"""Rank and alpha of each layer, and the initial adapter of both backends, drawn by numpy."""

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.models.experts import by_stack, uneven
from common.recipe import Recipe

Shapes = dict[str, tuple[int, int]]  # (out, in) by module name


def layer_number(module: str) -> int:
    """Of `model.layers.17.mlp.up_proj`: 17."""
    return int(module.split("layers.", 1)[1].split(".", 1)[0])


def layer_count(shapes: Shapes) -> int:
    return 1 + max(layer_number(module) for module in shapes)


def choose_layers(shapes: Shapes, layers: str | None, count: int) -> Shapes:
    """The modules in the layers that --layers names: `last:N`, or numbers from 0 and inclusive ranges, as `0,4-7`.

    count: the model's layers. Raises UserError for a layer that it does not have, or where none of them has a module.
    """
    if layers is None:
        return shapes
    chosen: set[int] = set()
    if layers.startswith("last:"):
        last = int(layers.removeprefix("last:"))
        if last > count:
            raise UserError(f"--layers {layers}: the model has {count} layers.", f"Give last:{count} or less.")
        chosen = set(range(count - last, count))
    else:
        for part in layers.split(","):
            first, _, end = part.partition("-")
            if int(end or first) >= count:  # before a set is made of a range that fills the memory
                raise UserError(
                    f"--layers {layers}: the model has no layer {end or first}; its layers are 0 to {count - 1}.",
                    "Count from 0; ranges include both ends.",
                )
            chosen |= set(range(int(first), int(end or first) + 1))
    found = {module: shape for module, shape in shapes.items() if layer_number(module) in chosen}
    if not found:
        there = ", ".join(map(str, sorted({*map(layer_number, shapes)})))
        raise UserError(f"--layers {layers}: none of --targets is in these layers.", f"They are in the layers {there}.")
    return found


def ranks_and_alphas(recipe: Recipe, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each module by --rank-pattern and --alpha-pattern; the first match counts, as in PEFT.

    A pattern is a module's name, or the end of it after a dot; `*` matches anything. Raises UserError for a pattern
    that matches nothing.
    """
    unused = {("rank", key) for key in recipe.rank_pattern} | {("alpha", key) for key in recipe.alpha_pattern}
    found = {}
    for module in modules:
        values: dict[str, float] = {"rank": recipe.rank, "alpha": recipe.alpha}
        for name, patterns in (("rank", recipe.rank_pattern), ("alpha", recipe.alpha_pattern)):
            for key, value in patterns.items():
                if fnmatch.fnmatchcase(module, key) or fnmatch.fnmatchcase(module, f"*.{key}"):
                    values[name] = value
                    unused.discard((name, key))
                    break
        found[module] = (int(values["rank"]), float(values["alpha"]))
    if unused:
        shown = ", ".join(f"--{name}-pattern {key}" for name, key in sorted(unused))
        raise UserError(
            f"{shown}: matches no adapted layer that an earlier pattern does not match.",
            f"Names look like {modules[0]}; give the end of one, such as {modules[0].rsplit('.', 1)[-1]}.",
        )
    return found


def initial_adapter(shapes: Shapes, layers: int, recipe: Recipe) -> Adapter:
    """The adapter that training starts from: A uniform in +-1/sqrt(in) as in Hu et al. 2021 and PEFT, B zero.

    shapes: of the modules to adapt; layers: the number of the base model's. Both backends get the same numbers. Raises
    UserError for a rank above every size of its module: it would only take memory.
    """
    random = np.random.default_rng([recipe.seed, 0])
    weights = {}
    for name, (rank, alpha) in ranks_and_alphas(recipe, sorted(shapes)).items():
        out_features, in_features = shapes[name]
        if rank > max(shapes[name]):
            raise UserError(
                f"--rank {rank}: {name} is a matrix of {out_features} x {in_features}: more has no effect.",
                f"Give a rank up to {min(shapes[name])}; 8 to 64 are usual.",
            )
        bound = 1 / math.sqrt(in_features)
        A = random.uniform(-bound, bound, (rank, in_features)).astype(np.float32)
        weights[name] = LoraWeight(A, np.zeros((out_features, rank), np.float32), alpha, recipe.rslora)
    if faults := uneven(weights):
        raise UserError(f"--rank-pattern and --alpha-pattern: {faults[0]}.", "Give all experts of a layer the same.")
    return Adapter(recipe.model, layers, recipe.dropout, weights, dora=recipe.method == "dora")


def validate(adapter: Adapter, shapes: Shapes, where: Path) -> None:
    """Raises UserError listing all matrices that do not fit the base model, or are not finite."""
    faults = []
    for name, weight in adapter.weights.items():
        if name not in shapes:
            faults.append(f"{name}: the base model has no such linear layer")
            continue
        out_features, in_features = shapes[name]
        wanted = {"lora_A": (weight.rank, in_features), "lora_B": (out_features, weight.rank)}
        wanted["magnitude"] = (out_features,)  # type: ignore[assignment]  # a vector
        if not math.isfinite(weight.alpha):
            faults.append(f"{name}: its alpha is {weight.alpha}")
        for part, array in weight.parts().items():
            if array.shape != wanted[part]:
                faults.append(f"{name}.{part}: shape {array.shape}, the base model wants {wanted[part]}")
            elif not np.isfinite(array).all():
                faults.append(f"{name}.{part}: holds values that are not finite")
    faults += uneven(adapter.weights)
    experts = by_stack(shapes)
    faults += [
        f"{stack}: it adapts {len(members)} of {len(experts[stack])} experts"
        for stack, members in by_stack(adapter.weights).items()
        if len(members) != len(experts.get(stack, members))
    ]
    broken = [name for name, tensor in adapter.full.items() if not np.isfinite(tensor).all()]
    faults += [f"{name}: holds values that are not finite" for name in broken]
    if not adapter.weights and not adapter.full:
        faults.append("it holds no LoRA weights")
    if faults:
        more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise UserError(
            f"The adapter in {where} does not fit its base model:\n" + "\n".join(faults[:10] + more),
            "Give the adapter's own base model, or train it again.",
        )

"""What of a loaded model is trained: an adapter's parameters, or all of its own."""

from typing import Any, NamedTuple

import torch

from common.backend import Adapter
from common.recipe import Recipe
from torch_backend.layers import install
from torch_backend.linear import LoraGroup
from torch_backend.lora import attach
from torch_backend.model import DTYPES, kept_stored
from torch_backend.shards import Shards


class Trained(NamedTuple):
    outer: Any  # the model, with PEFT's around it where there is an adapter
    parameters: dict[str, torch.nn.Parameter]  # by canonical name
    shards: Shards | None
    groups: list[LoraGroup]  # layers of ours with LoRA

    @staticmethod
    def of(
        model: Any, names: dict[str, str], recipe: Recipe, adapter: Adapter | None, shard_on: str, known: bool
    ) -> "Trained":
        """names: of the model's tensors -> canonical. shard_on: the kind of device to shard it on, or nothing.

        known: whether the model's layers are of an architecture that has layers of ours.
        """
        if adapter is None:
            # transformers marks the pad token's row, and torch gives it no gradient. Where pad is the token that ends
            # a turn, its embedding would never learn.
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.padding_idx = None
            shards = _sharded(model, recipe, shard_on, {})
            return Trained(model, {names[name]: p for name, p in model.named_parameters()}, shards, [])
        outer, parameters = attach(model, adapter)
        groups = install(model, adapter) if known else []
        return Trained(outer, parameters, _sharded(model, recipe, shard_on, parameters), groups)


def _sharded(model: Any, recipe: Recipe, device: str, adapter: dict[str, torch.nn.Parameter]) -> Shards | None:
    if not device:
        return None
    shards = Shards(model, device, adapter.values())
    shards.shard(DTYPES[recipe.precision], kept_stored(recipe, torch.device(device)))
    return shards

"""The forward pass over rows of token ids: packed, through layers of ours, or by transformers alone."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from common.backend import Batch
from common.data.batching import single_rows
from common.recipe import Plan
from torch_backend.attention import has_flash
from torch_backend.loss import loss_sum
from torch_backend.matmul import pad_multiple
from torch_backend.memory_terms import packs_attention

# Ids that continue a row, and whether it is a new one -> the logits [vocabulary] after them.
Continue = Callable[[list[int], bool], torch.Tensor]


class Forward(Protocol):
    """How a model computes. flash: attention reads packed rows."""

    flash: bool

    def parts(self, batch: Batch) -> list[Batch]:
        """What is computed, forward and backward, at once."""
        ...

    def loss(self, batch: Batch, chunk: int) -> torch.Tensor:
        """Weighted sum of the token losses, a float32 scalar. chunk: label positions whose logits are held at once."""
        ...

    def padded_tokens(self, batch: Batch) -> int:
        """Positions that attention computes."""
        ...

    def logits(self, ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """[P, vocabulary] at `positions` [P] of one row of ids [T]."""
        ...

    def continuing(self) -> Continue:
        """A function that keeps the keys, values and states of a row."""
        ...


class PackedForward:
    """Of a known architecture: rows are packed, and padded inside attention only."""

    def __init__(self, model: Any, config: dict[str, Any], plan: Plan, precision: str) -> None:
        self.model, self.device = model, torch.device(plan.device_name)
        self.pad_multiple = pad_multiple(self.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.mixes = bool({"linear_attention", "conv"} & {*(config.get("layer_types") or ())})
        padded = config["model_type"] == "gemma2" or self.mixes
        widest = max(config["head_dim"], config.get("global_head_dim") or 0)
        self.flash = packs_attention(widest, padded, plan.device, precision) and has_flash(self.device)

    def parts(self, batch: Batch) -> list[Batch]:
        return [batch]

    def loss(self, batch: Batch, chunk: int) -> torch.Tensor:
        return loss_sum(self.model, batch, self.device, chunk, self.flash, self.pad_multiple)

    def padded_tokens(self, batch: Batch) -> int:
        rows, width = batch.input_ids.shape
        return batch.tokens if self.flash else rows * -(-width // self.pad_multiple) * self.pad_multiple

    def logits(self, ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        return _logits(self.model, ids, positions, self.device)

    def continuing(self) -> Continue:
        from transformers import DynamicCache

        cache: Any = None

        def forward(ids: list[int], restart: bool) -> torch.Tensor:
            nonlocal cache
            if restart:
                # without a config it keeps every key; `attend` cuts the windows
                cache = DynamicCache(config=self.model.config if self.mixes else None)
            found = self.model(
                input_ids=torch.tensor([ids], device=self.device), cache=cache, use_cache=True, logits_to_keep=1
            )
            return found.logits[0, -1]

        return forward


class PlainForward:
    """Of any other: transformers' layers, one row at a time.

    A row alone needs no padding and no mask. So whatever the layers are (attention, convolution, state space), they
    compute what transformers defines.
    """

    flash = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self._accepts = inspect.signature(model.forward).parameters

    def parts(self, batch: Batch) -> list[Batch]:
        return [row for row in single_rows(batch) if row.label_tokens]

    def loss(self, batch: Batch, chunk: int) -> torch.Tensor:
        return sum(map(self._row_loss, self.parts(batch)), torch.zeros((), device=self.device))

    def _row_loss(self, row: Batch) -> torch.Tensor:
        labels = row.loss_weights[0].nonzero()[0]
        targets = torch.from_numpy(row.targets[0, labels].astype(np.int64)).to(self.device)
        weights = torch.from_numpy(row.loss_weights[0, labels]).to(self.device)
        logits = self.logits(row.input_ids[0], labels).float()
        return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def padded_tokens(self, batch: Batch) -> int:
        return batch.tokens

    def logits(self, ids: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        if "logits_to_keep" in self._accepts:
            return _logits(self.model, ids, positions, self.device)
        inputs = torch.from_numpy(np.asarray(ids, np.int64))[None].to(self.device)
        return self.model(input_ids=inputs, use_cache=False).logits[0, np.asarray(positions, np.int64)]

    def continuing(self) -> Continue:
        """Where the model takes no `cache`, each token computes the complete row."""
        row: list[int] = []
        cache: Any = None

        def forward(ids: list[int], restart: bool) -> torch.Tensor:
            nonlocal row, cache
            row = [*ids] if restart else [*row, *ids]
            if "cache" not in self._accepts:
                return self.logits(np.array(row), np.array([len(row) - 1]))[0]
            inputs = torch.tensor([ids], device=self.device)
            found = self.model(input_ids=inputs, cache=None if restart else cache, use_cache=True)
            cache = found.cache
            return found.logits[0, -1]

        return forward


def _logits(model: Any, ids: np.ndarray, positions: np.ndarray, device: torch.device) -> torch.Tensor:
    inputs = torch.from_numpy(np.asarray(ids, np.int64))[None].to(device)
    kept = torch.from_numpy(np.asarray(positions, np.int64)).to(device)
    return model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits[0]

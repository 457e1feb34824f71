"""A model sharded over the ranks by torch's FSDP2: each holds a part of every weight, and all of a layer for a while.

The embeddings, the last norm and the output head are complete from the beginning of a forward pass to the end of its
backward pass. An adapter is complete on every rank: it is small, and not FSDP2's.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from common.backend import OutOfMemory
from common.errors import AtOdds, RankLost, UserError, first_line
from torch_backend.host_memory import release_pages
from torch_backend.model import Stored, convert

_T = TypeVar("_T")


class Shards(torch.nn.Module):
    """FSDP2's root. Its forward pass is whatever is computed with the model, on every rank at the same time."""

    def __init__(self, model: Any, device: str, adapter: Collection[torch.nn.Parameter]) -> None:
        """model: on the CPU, as it is stored. device: its kind. adapter: its parameters, none for full fine-tuning."""
        super().__init__()
        self.model = model
        self._mesh, self._adapter = init_device_mesh(device, (dist.get_world_size(),)), set(adapter)

    def shard(self, dtype: torch.dtype, kept: Stored) -> None:
        """Convert and shard layer by layer, so that no rank ever holds the complete model; as for `convert`."""
        convert(self.model, dtype, kept, self._adapter, self._shard)
        self._shard(self)

    def _shard(self, module: torch.nn.Module) -> None:
        stored = [p.data for p in module.parameters() if p not in self._adapter and not isinstance(p, DTensor)]
        sharded = fully_shard(module, mesh=self._mesh, ignored_params=self._adapter)
        sharded.set_force_sum_reduction_for_comms(True)  # of gradients, as over one device's micro-batches
        sharded.set_gradient_divide_factor(1.0)
        for tensor in stored:
            release_pages(tensor)

    def forward(self, compute: Callable[[], _T]) -> _T:
        return compute()

    def compute(self, compute: Callable[[], _T]) -> _T:
        """The result of `compute`, which calls the model."""
        found: _T = self(compute)
        if not torch.is_grad_enabled():  # else the backward pass does this
            cast(FSDPModule, self).reshard()
        return found


@contextmanager
def together() -> Iterator[None]:
    """Around what the ranks compute layer by layer: where one of them fails the others wait in vain. Raises AtOdds."""
    try:
        yield
    except OutOfMemory as error:
        raise AtOdds(
            f"{error.what}; what ranks compute with a sharded model cannot be repeated",
            "Continue with --resume RUN and --gradient-checkpointing or a lower --micro-batch-tokens.",
        ) from None
    except UserError as error:
        raise AtOdds(error.what, error.fix) from None
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankLost(first_line(error)) from None
        raise


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on the ranks that hold a part each, which must ask for it together; else the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy the values into the tensor; of a sharded one, this rank's rows of them."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        rows = -(-len(values) // mesh.size())
        values, tensor = values[mesh.get_local_rank() * rows :][:rows], tensor.to_local()
    tensor.copy_(values)

"""The ranks that train together, over torch.distributed: NCCL between GPUs, gloo between CPUs and for what is said."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.errors import RankLost

_PATIENCE = timedelta(days=7)  # for rank 0, which may be asking the model or building llama.cpp: the dead are noticed


class TorchGroup:
    """See `common.backend_package.Group`."""

    def __init__(self, device: str) -> None:
        """device: this rank's. Joins by what torchrun has put into the environment."""
        index = torch.device(device).index or 0
        nccl = device.startswith("cuda") and dist.is_nccl_available() and _alone_on_its_gpu()
        if device.startswith("cuda"):
            torch.cuda.set_device(index)
        with _lost():
            store, self.rank, self.size = next(dist.rendezvous("env://"))
            # After a restart torchrun's store still holds the addresses of those that have ended (torch 2.13).
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_PATIENCE)

    def broadcast(self, data: bytes | None) -> bytes:
        with _lost():
            size = torch.tensor(len(data or b""))
            dist.broadcast(size, 0)
            content = bytearray(data or bytes(int(size)))
            dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), 0)
        return bytes(content)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        mine = torch.from_numpy(np.ascontiguousarray(array))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, mine)
        return [tensor.numpy() for tensor in found]

    def close(self) -> None:
        dist.destroy_process_group()


def sum_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Each becomes the sum of every rank's."""
    with _lost():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _alone_on_its_gpu() -> bool:
    """NCCL refuses two ranks of one GPU."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()


@contextmanager
def _lost() -> Iterator[None]:
    """RankLost for what torch raises where a process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).splitlines()[0]) from None

"""What torch keeps for the process while a device computes: the current GPU, threads, ceilings; and what it holds."""

import gc
import os
from contextlib import ExitStack

import torch

from common.backend import Memory
from common.system.cpu_load import ThreadCount
from common.system.hardware import physical_cores
from common.system.memory import ResidentSet, swap_used, total
from torch_backend.host_memory import malloc_trim

_MPS_CEILING = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"  # torch's own setting, which then stays as the user wants it
_MPS_DEFAULT = 1.7  # torch's ceiling as a multiple of the recommended size: more than the machine has


class DeviceSettings:
    """Settings of the process for one device, made at once; `restore` undoes them.

    memory_budget: bytes that the model and its training may take; 0: not known.
    """

    def __init__(self, device: torch.device, memory_budget: int) -> None:
        gc.collect()
        malloc_trim()  # what preparation has freed is not there for training to take uncounted
        self.device, self._resident, self._driver_peak = device, ResidentSet(), 0
        self._undo = ExitStack()
        self._threads: ThreadCount | None = None
        if device.type == "cpu":
            if "OMP_NUM_THREADS" not in os.environ:
                self._threads = ThreadCount(min(torch.get_num_threads(), physical_cores()))
                self._undo.callback(torch.set_num_threads, torch.get_num_threads())
            self.adapt_threads()
        elif device.type == "cuda":
            self._undo.callback(torch.cuda.set_device, torch.cuda.current_device())
            # libraries that are told of no device take the current one; of "cuda" alone torch makes an error
            torch.cuda.set_device(device.index or 0)
            torch.cuda.reset_peak_memory_stats(device)
        elif memory_budget and _MPS_CEILING not in os.environ:
            self._undo.callback(torch.mps.set_per_process_memory_fraction, _MPS_DEFAULT)
            share = memory_budget / torch.mps.recommended_max_memory()
            torch.mps.set_per_process_memory_fraction(min(share, _MPS_DEFAULT))

    def make_deterministic(self) -> None:
        """The same run gives the same bits again, where the kernels can."""
        before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        self._undo.callback(_deterministic, *before)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants; older torch insists on it
        _deterministic(True, False)  # filling is for debugging

    def adapt_threads(self) -> None:
        """On a CPU one thread for each core that no other program keeps busy, unless OMP_NUM_THREADS says otherwise.

        A setting of the calling thread, which is also the one that autograd computes on.
        """
        if self._threads is not None and self._threads.look() != torch.get_num_threads():
            torch.set_num_threads(self._threads.now)

    def threads(self) -> tuple[int, int] | None:
        return (self._threads.now, self._threads.most) if self._threads else None

    def memory(self) -> Memory:
        if self.device.type == "cpu":
            return self._resident.memory()
        if self.device.type == "mps":  # keeps no peak; but what its driver holds seldom falls
            self._driver_peak = max(self._driver_peak, torch.mps.driver_allocated_memory())
            return Memory(torch.mps.current_allocated_memory(), self._driver_peak, total(), "unified", swap_used())
        return Memory(
            used=torch.cuda.memory_allocated(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
            total=torch.cuda.get_device_properties(self.device).total_memory,
            kind="cuda",
            swap=swap_used(),
        )

    def restore(self) -> None:
        empty_cache()
        self._undo.close()


def empty_cache() -> None:
    """Give the blocks of a GPU back that nothing uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _deterministic(algorithms: bool, fill: bool) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = fill

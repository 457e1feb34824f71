"""Memory of this process and of the machine, in bytes."""

import ctypes
import mmap
import platform
import resource
import sys
import threading
from pathlib import Path
from typing import Any

from common.backend import Memory


class ResidentSet:
    """Growth of the resident set since this object was made, for where no allocator keeps a peak."""

    def __init__(self) -> None:
        _reset_peak()
        self._start = rss()

    def used(self) -> int:
        return max(0, rss() - self._start)

    def peak(self) -> int:
        return max(0, peak_rss() - self._start)

    def process_peak(self) -> int:
        """The process's peak; on Linux since the start of training, so that what came before does not count."""
        return peak_rss()

    def memory(self) -> Memory:
        return Memory(self.used(), self.peak(), total(), "rss", swap_used())


def rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The resident set's peak. getrusage counts kilobytes on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


KEPT_BLOCKS = 4 * 2**20  # bytes
GAPS_EVERY = 4  # layers, with gradient checkpointing


def give_back_blocks() -> None:
    """Let glibc return every freed block of `KEPT_BLOCKS` or more to Linux at once.

    Left to itself it soon keeps blocks of up to 32 MB, and the gaps between them: a 1B model's step took 1.3 GB instead
    of 0.9. At 4 MB that costs no time; at 2 MB up to a fifth more, for page faults. mallopt(3), M_MMAP_THRESHOLD.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, KEPT_BLOCKS)


def malloc_trim() -> None:
    """Let glibc return the whole pages of its gaps, the free blocks between kept ones, to Linux; some 10 ms.

    2.36 does not fill a gap with an aligned block of the very size that was freed there: every short-lived tensor of a
    layer leaves one. With gradient checkpointing SmolLM2's step took 1.05 GB, and with this 0.58. malloc_trim(3).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_pages(tensor: Any) -> None:
    """Tell Linux that the whole pages of `tensor`, a torch tensor that nobody reads again, are not needed."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _reset_peak() -> None:
    """Let Linux count the peak from here on (proc(5), clear_refs); elsewhere the process's whole life counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def total() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def swap_used() -> int:
    import psutil

    return int(psutil.swap_memory().used)


class Extra:
    """A context manager: the peak of what this process and its children hold beyond what they held at its start.

    Sampled twenty times a second; `getrusage` cannot tell it: Linux hands a parent's peak on to the children that it
    starts. On Linux pages of mapped files, which the system takes back at need, do not count.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Extra":
        self._start = _held()
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, _held() - self._start)


def _held() -> int:
    import psutil

    held = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            found = process.memory_info()
        except psutil.Error:  # it has ended
            continue
        held += found.rss - getattr(found, "shared", 0)
    return int(held)

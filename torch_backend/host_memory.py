"""Freed memory that glibc and Linux take back: on a CPU the resident set is what a step needs. Imports no torch."""

import ctypes
import mmap
import platform
import sys
from typing import Any

KEPT_BLOCKS = 4 * 2**20  # bytes
TRIM_EVERY = 4  # layers, with gradient checkpointing


def return_large_blocks() -> None:
    """Let glibc return every freed block of `KEPT_BLOCKS` or more to Linux at once (mallopt(3), M_MMAP_THRESHOLD).

    By default it soon keeps blocks of up to 32 MB, and the gaps between them: a 1B model's step took 1.3 GB instead of
    0.9. At 4 MB that costs no time; at 2 MB page faults cost up to a fifth more.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, KEPT_BLOCKS)


def malloc_trim() -> None:
    """Let glibc return the whole pages of free blocks between kept ones to Linux (malloc_trim(3)); some 10 ms.

    glibc 2.36 does not fill a gap with an aligned block of the very size that was freed there: every short-lived tensor
    of a layer leaves one. With gradient checkpointing SmolLM2's step took 1.05 GB, and with this 0.58.
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

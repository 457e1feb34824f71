"""Memory of this process and of the machine, in bytes."""

import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path

from common.backend import Memory
from common.system import cgroup


class ResidentSet:
    """Growth of the resident set since this object was made, where no allocator keeps a peak.

    Making it resets the process's own peak on Linux: `peak_rss` then counts from there on. Where it cannot be reset,
    the peak is the highest growth that was asked for: what was taken before must not count.
    """

    def __init__(self) -> None:
        self._exact = reset_peak_rss()
        self._start, self._highest = rss(), 0

    def used(self) -> int:
        found = max(0, rss() - self._start)
        self._highest = max(self._highest, found)
        return found

    def peak(self) -> int:
        return max(0, peak_rss() - self._start) if self._exact else max(self._highest, self.used())

    def memory(self) -> Memory:
        return Memory(self.used(), self.peak(), total(), "rss" if self._exact else "sampled", swap_used())


def rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The resident set's peak; on Linux since it was last reset.

    getrusage counts in kilobytes on Linux and in bytes on macOS. Its peak survives `exec`: on Linux it may be that of
    the program that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Let Linux count the peak from here on (proc(5), clear_refs); False where it counts from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def total() -> int:
    """The machine's memory, or the part of it that this process's container or job may take."""
    limit = cgroup.memory_limit()
    return min(physical(), int(limit.amount)) if limit else physical()


def physical() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def available() -> int:
    """What the system could still give to this process without swapping."""
    import psutil

    left, free = cgroup.memory_left(), int(psutil.virtual_memory().available)
    return free if left is None else min(free, left)


def available_to_gpu() -> int:
    """What a GPU that shares the machine's memory could take.

    macOS counts only free and inactive pages as available, though it compresses pages of idle programs at need. All
    but a quarter of the memory, and what is wired, counts here instead. Estimated: it never ran on a Mac.
    """
    import psutil

    if sys.platform != "darwin":
        return available()
    memory = psutil.virtual_memory()
    return max(int(memory.available), int(memory.total - memory.wired - memory.total // 4))


def swap_used() -> int:
    import psutil

    return int(psutil.swap_memory().used)


class PeakMemory:
    """A context manager: the peak of what this process and its children hold beyond what they held at its start.

    Sampled twenty times a second; `getrusage` cannot tell it: Linux hands a parent's peak on to the children that it
    starts. On Linux pages of mapped files, which the system takes back at need, do not count.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
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

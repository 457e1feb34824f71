"""How much of the CPU other programs take, and how many threads compute best beside them."""

import math
import os
import time

_EVERY = 0.5  # seconds between two looks: the system counts in hundredths of a second
_QUIET = 5.0  # seconds without other programs until there are more threads again
_SLACK = 0.25  # cores that others may take before a thread is given up: a desktop is never quite idle


class OtherPrograms:
    """The cores that other programs keep busy, among those that this process may use. Counts from its creation on."""

    def __init__(self) -> None:
        self._allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.cores = len(self._allowed) or os.cpu_count() or 1
        self._others, self._at = self._seconds(), time.monotonic()

    def busy_cores(self) -> float | None:
        """On average since the last answer; None where that is less than half a second ago, or nothing counts them."""
        passed = time.monotonic() - self._at
        if passed < _EVERY:
            return None
        before, self._others = self._others, self._seconds()
        self._at += passed
        return None if before is None or self._others is None else max(0.0, self._others - before) / passed

    def _seconds(self) -> float | None:
        """Of all other programs; what a hypervisor takes is nobody's here."""
        import psutil

        try:
            counted = psutil.cpu_times(percpu=True)
        except OSError:  # a container without /proc/stat
            return None
        if self._allowed and self._allowed[-1] < len(counted):
            counted = [counted[i] for i in self._allowed]
        names = ("user", "nice", "system", "irq", "softirq")
        own = os.times()
        return sum(getattr(core, name, 0.0) for core in counted for name in names) - own.user - own.system


class ThreadCount:
    """How many threads to compute with, at most `most`: no two programs on one core.

    OpenMP's threads wait for each other hundreds of times in a step. Where one of them shares its core with another
    busy program, all wait for its turn, and a step takes 25 times as long.
    """

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._others, self._last_low = OtherPrograms(), -math.inf

    def look(self) -> int:
        """The count by the present load. It falls at once, and rises after five quiet seconds."""
        busy = self._others.busy_cores()
        if busy is not None:
            wanted = max(1, min(self.most, self._others.cores - math.ceil(busy - _SLACK)))
            clock = time.monotonic()
            if wanted <= self.now:
                self.now, self._last_low = wanted, clock
            elif clock - self._last_low >= _QUIET:
                self.now = wanted
        return self.now

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
        self._allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self.cores = len(self._allowed or ()) or os.cpu_count() or 1
        self._busy, self._own, self._at = self._seconds()

    def busy_cores(self) -> float | None:
        """On average since the last answer; None where that is less than half a second ago."""
        if time.monotonic() - self._at < _EVERY:
            return None
        busy, own, at = self._seconds()
        found = (busy - self._busy - (own - self._own)) / (at - self._at)
        self._busy, self._own, self._at = busy, own, at
        return max(0.0, found)

    def _seconds(self) -> tuple[float, float, float]:
        """`(of all programs, of this process, the clock)`; what a hypervisor takes is nobody's here."""
        import psutil

        of_cores = psutil.cpu_times(percpu=True)
        some = [of_cores[i] for i in self._allowed if i < len(of_cores)] if self._allowed else of_cores
        names = ("user", "nice", "system", "irq", "softirq")
        times = os.times()
        busy = sum(getattr(core, name, 0.0) for core in some for name in names)
        return busy, times.user + times.system, time.monotonic()


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

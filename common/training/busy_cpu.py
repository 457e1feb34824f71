"""What the loop puts on record of a busy CPU, beside whose other programs the backend computes with fewer threads."""

from dataclasses import dataclass
from typing import Any

from common.training.observer import Observer


@dataclass
class BusyCpu:
    """Adds the number of threads to a step's line, for rounding depends on it; says once that there are fewer."""

    observer: Observer
    _said: bool = False

    def note(self, line: dict[str, Any], threads: tuple[int, int] | None) -> None:
        """threads: the step's, as cpu_threads gave them."""
        if threads is None:
            return
        line["threads"], most = threads
        if line["threads"] < most and not self._said:
            self._said = True
            self.observer.say(
                f"other programs keep the CPU busy: {line['threads']} of {most} threads compute until they are done"
            )

"""What the training loop reports, and the one thing it asks: whether it should stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.backend import Memory
from common.display import Display


class Observer(Protocol):
    def step(self, line: dict, memory: Memory) -> None: ...

    def evaluation(self, line: dict) -> None: ...

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def stop_requested(self) -> bool: ...


@dataclass(frozen=True)
class DisplayObserver:
    """Shows what the loop reports. stops: the stop signals that have come, as `stop_signals` yields them."""

    display: Display
    stops: Sequence[int] = ()

    def step(self, line: dict, memory: Memory) -> None:
        self.display.step(line, memory)

    def evaluation(self, line: dict) -> None:
        self.display.evaluation(line)

    def say(self, text: str) -> None:
        self.display.say(text)

    def warn(self, text: str) -> None:
        self.display.warn(text)

    def stop_requested(self) -> bool:
        return bool(self.stops)

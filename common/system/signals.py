"""Signals that ask a long job to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def heeded() -> list[signal.Signals]:
    """Of STOPS those that this process does not ignore, as it does SIGHUP under nohup."""
    return [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def stop_signals(on_first: Callable[[], None]) -> Iterator[list[int]]:
    """Yields the list of stop signals that have come: Ctrl-C, SIGTERM, and SIGHUP of a terminal that hangs up.

    The job looks at the list and stops where it can. `on_first` is called at the first signal, by its handler. A second
    Ctrl-C acts at once; a system that sends SIGHUP and then SIGTERM means one stop. Under nohup, which ignores SIGHUP,
    it stays ignored.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            on_first()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

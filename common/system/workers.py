"""A function over many items, in several processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from common.errors import UserError
from common.system.hardware import cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8  # processes: each takes 0.1 GB
_AHEAD = 2  # items in progress for each process, so that none waits


def processes() -> int:
    """As many as there are cores, up to eight."""
    return min(cores(), _MOST)


def no_beginning() -> None:
    """Where a process needs no beginning; a lambda could not be sent to it."""


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    begin: Callable[..., None] = no_beginning,
    given: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`function` of each item, in the order of the items. No more items are taken than are in progress.

    begin: called first in each process, with `given`. With one process all of it happens in this one. Raises what
    `function` raises, and UserError where a process was killed. The processes end with the iteration, and with this
    process, however that ends. A terminal sends Ctrl-C to all of them; only this one gets it.
    """
    if processes == 1:
        begin(*given)
        yield from map(function, items)
        return
    os.environ["PYTHONSAFEPATH"] = "1"  # a new process would import modules from the folder it starts in
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(processes, context, _begin, (begin, given))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(_uninterrupted(pool.submit, function, item))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "A process that works on the rows was killed, most likely because memory ran out.",
            "Close other programs and start again.",
        ) from None
    finally:
        _uninterrupted(pool.shutdown, cancel_futures=True)  # cut short, it would leave processes that wait for ever


def _uninterrupted(call: Callable[..., Result], *given: Any, **named: Any) -> Result:
    """What the call returns; Ctrl-C comes after it, and never to a process that it starts, which inherits the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        return call(*given, **named)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*given)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

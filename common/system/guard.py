"""Runs a program that ends with the process that started it, however that process ends.

usage: guard.py PIPE PROGRAM ARGUMENT...

PIPE is the reading end of a pipe to which nobody writes. It ends when its other end is closed, which the system does
for a killed process too. Then the program is killed with all that it has started. Where it ends by itself, what it has
left is killed: on Linux all of it, elsewhere its process group. Descriptors of locks are inherited by all of them.
SIGTERM and its like are passed on to the program. The exit status is the program's, or 128 + the number of the signal
that ended it. This file is a program of its own: only a process with one thread can safely prepare another one.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(pipe: int, command: list[str]) -> int:
    started: list[subprocess.Popen[bytes]] = []
    ending = threading.Event()

    def pass_on(number: int, frame: object) -> None:
        for process in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the latter where all are zombies
                os.killpg(process.pid, number)

    def kill() -> None:
        try:
            _kill_descendants()  # first, while the tree of processes is whole
        finally:
            pass_on(signal.SIGKILL, None)

    def end() -> None:
        os.read(pipe, 1)
        ending.set()
        kill()

    import psutil  # noqa: F401 -- where it is missing, nothing is started

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    os.set_inheritable(pipe, False)
    try:  # close_fds: what else is inheritable is a lock's, and is held as long as any of them lives
        started.append(subprocess.Popen(command, process_group=0, close_fds=False, preexec_fn=_linux_setup()))
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        return 127
    watch = threading.Thread(target=end, daemon=True)
    watch.start()
    status = started[0].wait()
    if ending.is_set():
        watch.join()
    else:
        kill()  # what it has left in the background
    return status if status >= 0 else 128 - status


def _linux_setup() -> Callable[[], None] | None:
    """What is to be called in the child before the program. On Linux orphans come to this process, to be killed too."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # where somebody kills this process alone


def _kill_descendants() -> None:
    """Kill all that is below this process until nothing is: a compiler may have another process group."""
    import psutil

    refused: set[psutil.Process] = set()
    while True:
        alive = False
        for child in psutil.Process().children(recursive=True):
            try:
                if child not in refused and child.status() != psutil.STATUS_ZOMBIE:
                    child.kill()
                    alive = True
            except psutil.NoSuchProcess:
                pass
            except psutil.AccessDenied:  # another user's, by setuid
                refused.add(child)
        if not alive:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))

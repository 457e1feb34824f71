"""Runs a Python program in this process, as a rank that ends with its launcher, however that ends.

usage: guard_rank.py LAUNCHER PROGRAM ARGUMENT...

LAUNCHER is the number of the process that has started this one. Each rank has a session of its own, and torch's
launcher hands on no pipe: the rank itself looks whether its parent is still that process. What it has started ends with
it.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

_LOOK = 0.5  # seconds
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(launcher: int, command: list[str]) -> None:
    if sys.platform == "linux":  # even while MLX waits for the other ranks, which lets no thread of Python run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))  # as where Python itself runs the program
    runpy.run_path(command[0], run_name="__main__")


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])

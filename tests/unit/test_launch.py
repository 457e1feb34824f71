"""What a launcher starts: ranks that are the program as it was typed, and that end with the launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import ROOT

LAUNCH = "import sys; from {0}_backend.launch import launch; sys.exit(launch(2, sys.argv[1:]))"
RANK = """
import beside, os, sys, time
open(f"{os.getpid()}.pid", "w").write(" ".join(sys.argv))
time.sleep(float(sys.argv[1]))
"""


def launcher(backend: str, seconds: float, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "beside.py").touch()  # a module that Python finds where it runs the program itself
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-c", LAUNCH.format(backend), "rank.py", str(seconds)]
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)


def ranks(folder: Path) -> dict[int, str]:
    """What each was given, by its process."""
    return {int(path.stem): path.read_text() for path in folder.glob("*.pid")}


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_ranks_end_with_a_launcher_that_is_killed(backend: str, tmp_path: Path) -> None:
    process = launcher(backend, 90, tmp_path)
    try:
        wait_for(lambda: len(ranks(tmp_path)) == 2 and all(ranks(tmp_path).values()))
        assert set(ranks(tmp_path).values()) == {"rank.py 90"}
        assert all(map(runs, ranks(tmp_path)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(runs, ranks(tmp_path))), 10)
    finally:
        process.kill()
        for pid in filter(runs, ranks(tmp_path)):
            os.kill(pid, signal.SIGKILL)


def test_a_rank_that_ends_by_itself_gives_its_status(tmp_path: Path) -> None:
    assert launcher("mlx", 0, tmp_path).wait(60) == 0
    assert set(ranks(tmp_path).values()) == {"rank.py 0"}

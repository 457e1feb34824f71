"""Processes that work on the rows: Ctrl-C, which a terminal sends to all of them, is their parent's to act on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Its workers take half a second to start.
CODE = """
import signal, sys, time
sys.path.insert(0, {root!r})
from common.system.workers import ordered_map
if __name__ == "__mp_main__":
    time.sleep(0.5)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    print("started", flush=True)
    try:
        for _ in ordered_map(time.sleep, [{seconds}] * 1000, 2):
            print("done", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@contextmanager
def working(path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own that has started."""
    path.write_text(CODE.format(root=str(ROOT), seconds=seconds))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(path)], start_new_session=True, text=True, **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("after", [0.1, 0.4, 0.9])
def test_ctrl_c_is_quiet_at_any_moment(tmp_path: Path, after: float) -> None:
    with working(tmp_path / "work.py", 0.01) as process:
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
@pytest.mark.parametrize("begun", [False, True])
def test_no_process_outlives_the_one_that_is_stopped(tmp_path: Path, numbers: list[int], begun: bool) -> None:
    with working(tmp_path / "work.py", 0.2) as process:
        assert process.stdout
        if begun:
            assert process.stdout.readline() == "done\n"
        else:
            time.sleep(0.3)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.05)
        process.communicate(timeout=20)  # until nobody holds its output


def test_a_strangers_folder_gives_the_processes_no_module(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("multiprocessing", "common", "numpy", "json", "signal", "work"):
        (trap / f"{name}.py").write_text(f"open({str(tmp_path / 'obeyed')!r}, 'w').close()")
    (tmp_path / "work.py").write_text(CODE.format(root=str(ROOT), seconds=0).replace("* 1000", "* 10"))
    done = subprocess.run([sys.executable, str(tmp_path / "work.py")], cwd=trap, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("done")) == (0, "", 10)
    assert not (tmp_path / "obeyed").exists()

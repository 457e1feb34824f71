"""Programs beside this one: they end with their block, whatever the guard meets."""

import fcntl
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from common.system.process import (
    capture,
    failed_by_machine,
    not_started,
    of_another_cpu,
    run_logged,
    running,
    short_of_memory,
)
from tests import ROOT

SLEEP = "import time; print('ready', flush=True); time.sleep(15)"


def seconds_to_end(code: str) -> tuple[float, int]:
    """How long a block takes to end whose program runs `code`, and the program's exit status."""
    with running([sys.executable, "-c", code], stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        start = time.monotonic()
    return time.monotonic() - start, process.returncode


def test_the_guard_finds_its_packages_where_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", sysconfig.get_path("platlib"))
    monkeypatch.setattr(sys, "executable", getattr(sys, "_base_executable"))  # noqa: B009 -- not a public name
    seconds, status = seconds_to_end(SLEEP)
    assert (seconds < 10, status) == (True, 128 + 9)


@pytest.mark.parametrize("error", ["MemoryError", "PermissionError"])
def test_a_program_ends_where_the_processes_cannot_be_listed(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "psutil.py").write_text(f"def Process(): raise {error}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seconds, status = seconds_to_end(SLEEP)
    assert (seconds < 10, status) == (True, 128 + 9)


INNER = """
import subprocess, sys
code = "import time; time.sleep(15)"
inner = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, close_fds=False)
print(inner.pid, flush=True)
"""


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans do not come to the guard")
def test_a_program_that_ends_by_itself_leaves_no_session_of_its_own(tmp_path: Path) -> None:
    start = time.monotonic()
    status, pid = run_logged([sys.executable, "-c", INNER], tmp_path / "log", lambda line: None)
    assert (status, gone(int(pid)), time.monotonic() - start < 10) == (0, True, True)


def test_a_lock_is_held_while_any_program_lives_though_the_guard_is_killed(tmp_path: Path) -> None:
    mine = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(mine, fcntl.LOCK_EX)
    with running([sys.executable, "-c", INNER + "inner.wait()"], keep=(mine,), stdout=-1) as process:
        os.close(mine)
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()  # the guard
        process.wait()
    other = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        psutil.Process(pid).kill()
        os.close(other)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_log_that_the_disk_refuses_is_named() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        run_logged([sys.executable, "-c", ""], Path("/dev/full"), lambda line: None)
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (137, [], True),
        (-9, [], True),
        (1, ["load", "failed to allocate buffer for kv cache"], True),
        (1, ["std::bad_alloc"], True),
        (1, ["unknown model architecture: 'x'"], False),
        (134, ["GGML_ASSERT failed"], False),
    ],
)
def test_what_ended_for_want_of_memory(status: int, lines: list[str], expected: bool) -> None:
    assert short_of_memory(status, lines) == expected


@pytest.mark.parametrize(
    ("status", "foreign", "blameless"),
    [(132, True, True), (-4, True, True), (137, False, True), (1, False, False), (None, False, False)],
)
def test_what_ended_by_an_instruction_that_the_cpu_refuses(status: int | None, foreign: bool, blameless: bool) -> None:
    assert of_another_cpu(status) == foreign
    if status is not None:
        assert failed_by_machine(status, []) == blameless


NOTED = INNER.replace("print(inner.pid, flush=True)", "open('pid', 'w').write(str(inner.pid)); inner.wait()")


def test_a_captured_program_that_takes_too_long_ends_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert capture([sys.executable, "-c", NOTED], 5) == (1, f"{sys.executable} took more than 5 seconds")
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_captured_program_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = f"from common.system.process import capture; capture([{sys.executable!r}, '-c', {NOTED!r}], 60)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env) as process:
        end = time.monotonic() + 12  # before it would have ended by itself
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    while not gone(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_a_captured_program_comes_to(tmp_path: Path) -> None:
    assert capture([sys.executable, "-c", "print('a\\nb'); raise SystemExit(3)"], 60, lines=1) == (3, "b")
    status, said = capture([str(tmp_path / "nothing")], 60)
    assert not_started(status, [said])
    assert said == f"{tmp_path / 'nothing'}: No such file or directory"

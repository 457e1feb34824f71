"""Programs beside this one: they end with their block, whatever the guard meets."""

import sys
import sysconfig
import time
from pathlib import Path

import pytest

from common.system.process import running

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

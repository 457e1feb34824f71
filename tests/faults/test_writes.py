"""A sample of the refused writes; `python -m tests.faults.writes --all` refuses every one."""

import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a library is preloaded by Linux's own means")
def test_a_refused_write_loses_nothing() -> None:
    words = ["--share", "0.005", "--backends", "torch", "--exports", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.writes", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "survived" in done.stdout
    assert "clean error" in done.stdout
    assert ", 0 faults" in done.stdout.replace("; ", ", ")

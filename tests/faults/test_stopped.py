"""The short forms of kills and pairs. What only they find: a file that is missing or half-written at one moment."""

import re
import subprocess
import sys

import pytest

from tests import ROOT


def command(*words: str) -> str:
    """In a process of its own: it forks, and pytest's may have threads."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_killed_training_gives_the_same_result_after_its_resume() -> None:
    out = command("tests.faults.kills", "--kills", "2", "--export", "fused")
    assert re.search(r"^([2-9]|1\d) kills, \d+ new starts, 0 faults$", out, re.MULTILINE)  # a resume may be killed too


@pytest.mark.long
def test_two_commands_at_once_leave_a_run_intact() -> None:
    assert "\n2 pairs, 0 faults" in command("tests.faults.pairs", "--only", "1")

"""The short forms of kills and pairs. What only they find: a file that is missing or half-written at one moment."""

import subprocess
import sys

from tests import ROOT


def command(*words: str) -> str:
    """In a process of its own: it forks, and pytest's may have threads."""
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_killed_training_gives_the_same_result_after_its_resume() -> None:
    out = command("tests.faults.kills", "--kills", "6", "--export", "fused")
    assert "6 kills, " in out
    assert ", 0 faults" in out


def test_two_commands_on_one_run_leave_it_intact() -> None:
    assert "4 pairs, 0 faults" in command("tests.faults.pairs", "--only", "2")

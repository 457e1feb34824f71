"""Commands as a user types them, each in a process of its own."""

import subprocess
import sys
from typing import Any

from tests import ROOT


def twintune(*words: object, code: int = 0, **settings: Any) -> str:
    """Run the command line; its exit code is checked, its output returned."""
    return _output([str(ROOT / "cli.py"), *map(str, words)], code, settings)


def score(*words: object, code: int = 0) -> str:
    """`python -m examples.score`, as `make example` runs it; its exit code is checked, its output returned."""
    return _output(["-m", "examples.score", *map(str, words)], code, {"cwd": ROOT})


def _output(words: list[str], code: int, settings: dict[str, Any]) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=1500, check=False, **settings
    )
    assert done.returncode == code, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr

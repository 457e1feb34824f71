"""When, and at which commit, figures are measured."""

import subprocess
from datetime import date
from pathlib import Path


def now() -> dict[str, str]:
    """`date` and `commit`. Raises CalledProcessError where there is no checkout."""
    return {"date": date.today().isoformat(), "commit": _described()}


def known(given: str) -> dict[str, str]:
    """`date` and `commit`: what git says of the checkout, or what was given, for a copy that git does not know."""
    try:
        return {"date": date.today().isoformat(), "commit": given or _described()}
    except (OSError, subprocess.CalledProcessError):
        return {"date": date.today().isoformat(), "commit": "unknown"}


def _described() -> str:
    """It ends with `-dirty` where files of it were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    root = Path(__file__).parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

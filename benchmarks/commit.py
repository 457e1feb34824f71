"""When, and at which commit, figures are measured."""

import subprocess
from datetime import date


def now() -> dict[str, str]:
    """`date` and `commit`; the commit ends with `-dirty` where files of it were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"date": date.today().isoformat(), "commit": found.stdout.strip()}

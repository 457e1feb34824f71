"""The one exception a user ever sees, and how commands are named to users."""

import sys
from pathlib import Path

# As the user called it: installed, or from a checkout.
PROGRAM = "twintune" if Path(sys.argv[0]).stem == "twintune" else "python cli.py"


class UserError(Exception):
    """Something the user can fix.

    `what` says what is wrong and where (the file, the line or the option); `fix` says what to do about it, and may
    name a command as it is typed in a checkout: `python cli.py ...`.
    `cli.py` prints both and exits with status 1.
    """

    def __init__(self, what: str, fix: str) -> None:
        fix = fix.replace("python cli.py", PROGRAM)
        super().__init__(f"{what}\n{fix}")
        self.what = what
        self.fix = fix

"""The exception that a user sees, and what may be shown of others."""

import difflib
import errno
import re
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

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        """For another process: an exception is made again of the arguments that its class takes."""
        return type(self), (self.what, self.fix)


class Unable(UserError):
    """This machine could not do it now: it failed or ran out of memory, or a program was killed or too slow.

    It tells of no file.
    """


class AtOdds(UserError):
    """The processes that train together have come to different places: nothing can be agreed upon any more."""


class RankLost(AtOdds):
    """Another process that trains with this one has ended; raised in place of the framework's own error."""

    def __init__(self, reason: str, who: str = "a process that trains with this one") -> None:
        short = re.sub(r"^\[[^]]*\] ", "", reason).partition(". ")[0]  # torch begins with its source file, and goes on
        super().__init__(f"{who} has ended: {short}", "A run continues with --resume RUN, on any number of devices.")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.reason,)


class Ended(UserError):
    """The program that runs a model has ended: nothing more can be asked of it."""


class Starved(Ended, Unable):
    """It has ended for want of memory, or by an instruction that this CPU refuses."""


class Refusal(UserError):
    """A model cannot take these messages; it may take others."""


def install_extra(name: str) -> str:
    """The command that installs an extra of pyproject.toml."""
    return f'pip install "twintune[{name}]", or in a checkout: pip install -e ".[{name}]"'


def masked(text: str) -> str:
    """`text` without the hub's token and without the user and password of a URL, such as a proxy's or a mirror's."""
    hub = sys.modules.get("huggingface_hub")  # a token of which nobody has asked is in no text
    token = hub.get_token() if hub else None
    text = text.replace(token, "***") if token else text
    return re.sub(r"(?<=://)[^/\s]*@", "***@", text)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the kind of error where it has none; masked."""
    return masked((str(error).strip() or type(error).__name__).splitlines()[0])


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the largest file allowed


def os_fault(error: OSError, afterwards: str) -> UserError:
    """What the system refused, with the file's name. afterwards: what to do when the cause is gone."""
    reason = error.strerror or first_line(error)
    first = "Free space on that disk" if error.errno in _FULL else "Look at that path"
    return UserError(f"{reason}: {error.filename or 'no file is named'}", f"{first}, then {afterwards}")


def device_fault(error: Exception) -> Unable:
    """For a device that failed, and not for want of memory."""
    return Unable(
        f"The device failed: {first_line(error)}",
        "A run continues with --resume RUN; where it fails again, with a lower --memory-limit.",
    )


def nearest(name: str, known: list[str]) -> str:
    """`did you mean X? ` where something is near, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""

"""A process that feeds one tracker: events come as lines of JSON on standard input, answers go to standard output.

usage: python -m common.report.tracker NAME

The first line is a Begin. Answers: `{"id": ..., "place": ...}` when the tracker has begun, `{"failed": why}` when it
cannot begin or continue, `{"done": true}` when it has everything.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from common.errors import masked
from common.report.trackers import TRACKERS, Begin, Tracker

_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6  # of what may be a secret
_LONGEST = 300  # characters of a failure


def without_secrets(text: str) -> str:
    """`text` without what the environment and .netrc files keep secret, on one line."""
    secret = {value for name, value in os.environ.items() if _SECRET.search(name)} | set(_netrc_secrets())
    for value in sorted(secret, key=len, reverse=True):
        text = text.replace(value, "***") if len(value) >= _SHORTEST else text
    return " ".join(masked(text).split())[:_LONGEST]


def _netrc_secrets() -> Iterator[str]:
    """Where trackers keep the keys of their logins."""
    import netrc

    for name in ("~/.netrc", "~/_netrc", "~/.swanlab/.netrc"):
        try:
            hosts = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", name))).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        yield from (password for _, _, password in hosts.values() if password)


def feed(name: str, events: Iterator[dict[str, Any]], answer: Callable[..., None]) -> None:
    """Give the tracker all events."""
    tracker: Tracker = TRACKERS[name](Begin(**next(events)))
    answer(id=tracker.id, place=without_secrets(tracker.place))
    for event in events:
        match event.pop("event"):
            case "figures":
                tracker.figures(**event)
            case "answers":
                tracker.answers(**event)
            case "file":
                tracker.file(**event)
            case "end":
                tracker.end(**event)
                answer(done=True)
                return


def main(name: str) -> int:
    """Feed the tracker from what is standard input now; libraries get none, and what they print is shown to nobody."""
    source, target = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)

    def answer(**facts: Any) -> None:
        _answer(target, facts)

    try:
        feed(name, map(json.loads, source), answer)
    except BaseException as error:  # a tracker's library may raise anything, SystemExit too
        answer(failed=without_secrets(f"{type(error).__name__}: {error}"))
        return 1
    return 0


def _answer(target: TextIO, facts: dict[str, Any]) -> None:
    target.write(json.dumps(facts) + "\n")
    target.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""The processes that train together: who they are, and what they say to each other."""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from common.backend_package import Group, RankPackage
from common.errors import AtOdds, RankLost, UserError, first_line
from common.training.messages import Arrays, Message, decoded, encoded

_TEXT = 2048  # bytes of what a rank tells all others
_LOOKS, _LOOK = 20, 0.1  # how often, in seconds, it is looked who has ended
_MOST = 250  # characters of a part of it
_T = TypeVar("_T")


class Agreed(Exception):
    """All ranks raise the fault."""

    def __init__(self, fault: UserError) -> None:
        super().__init__(fault.what)
        self.fault = fault


@dataclass(frozen=True)
class Member:
    """One rank. free: bytes that it may count on, since others may compute on the same device. what: they are."""

    rank: int
    host: str
    pid: int
    device: str
    free: int
    what: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass
class Ranks:
    """A group and its members. All call the same of its methods in the same order, and `hear` where rank 0 tells.

    within: rank 0 has told something that all do together, and that has not come to its end: nothing else can be told.
    """

    group: Group
    members: list[Member]
    within: bool = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all do together. An error that all raise ends it too; another leaves the ranks at odds.

        Raises AtOdds for the other, for nothing may be tried after it.
        """
        self.within = True
        try:
            yield
        except Agreed as error:
            self.within = False
            raise error.fault from None
        except (UserError, OSError) as error:
            if isinstance(error, AtOdds):
                raise
            raise AtOdds(first_line(error), "Continue with --resume RUN.") from error
        self.within = False

    @staticmethod
    def join(package: RankPackage, device: str) -> "Ranks":
        """Join on the device; returns when all have."""
        group = package.join(device)
        free, what = package.free_memory(device)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "device": device, "free": free, "what": what}
        found = _gather_values(group, mine)
        shared = Counter((one["host"], one["device"]) for one in found)
        for one in found:
            one["free"] //= shared[one["host"], one["device"]]
        return Ranks(group, [Member(rank, **one) for rank, one in enumerate(found)])

    def tell(self, kind: str, values: dict[str, Any] | None = None, arrays: Arrays | None = None) -> None:
        """From rank 0 to all others."""
        self.naming(lambda: self.group.broadcast(encoded(kind, values or {}, arrays or {})))

    def hear(self) -> Message:
        """What rank 0 tells."""
        return decoded(self.naming(lambda: self.group.broadcast(None)))

    def gather(self, *figures: float) -> np.ndarray:
        """[ranks, figures] float64: every rank's."""
        return np.stack(self.naming(lambda: self.group.gather(np.array(figures, np.float64))))

    def agree(self, fault: UserError | None) -> None:
        """Raises Agreed where any of the ranks has a fault: that of the first."""
        mine = [fault.what[:_MOST], fault.fix[:_MOST]] if fault else None
        for member, found in zip(self.members, self.naming(lambda: _gather_values(self.group, mine)), strict=True):
            if found:
                raise Agreed(UserError(f"{member}: {found[0]}", found[1]))

    def naming(self, call: Callable[[], _T]) -> _T:
        """The call's result. RankLost says which rank has ended, where that can be seen from here."""
        try:
            return call()
        except RankLost as error:
            raise RankLost(error.reason, self._ended()) from None

    def _ended(self) -> str:
        here = socket.gethostname()
        for _ in range(_LOOKS):  # the system closes a process's connections before it counts as ended
            if ended := [str(member) for member in self.members if member.host == here and not _runs(member.pid)]:
                return ", ".join(ended)
            time.sleep(_LOOK)
        elsewhere = sorted({member.host for member in self.members} - {here})
        return f"a rank on {' or '.join(elsewhere or [here])}"


def _gather_values(group: Group, value: Any) -> list[Any]:
    """Every rank's value, which JSON can hold."""
    text = np.zeros(_TEXT, np.uint8)
    written = json.dumps(value, ensure_ascii=False).encode()
    text[: len(written)] = np.frombuffer(written, np.uint8)
    return [json.loads(found.tobytes().rstrip(b"\0")) for found in group.gather(text)]


def _runs(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

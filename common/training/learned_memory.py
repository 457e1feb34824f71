"""What trainings on this machine have taken of memory, and by how much the next estimate is corrected for it.

Kept in the user's cache, for each kind of training. Nothing here stops a training.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from common.documents import read_json_lines
from common.errors import UserError
from common.files import atomic_write
from common.system.cache import cache_folder

_FILE = "TWINTUNE_LEARN_MEMORY"  # the environment's: 0 keeps and reads nothing; else the file to use
_KEPT = 200  # observations in the file
_SAME, _OTHER = 0.01, 0.06  # by what share of a peak an observation may be off: of the same model, of another
_OLDER = 0.5  # by how much more with each that is newer: code and libraries change
_STEP = 0.25  # by what share the estimate of a micro-batch may be off before anything was observed
_FIXED, _OF_FIXED = 50e6, 0.05  # by how much that of the rest may be: bytes, and a share


class Observation(BaseModel):
    """A training's estimate and its peak, in bytes."""

    kind: str  # backend, device, precision and so on: what has constants of its own
    estimate: str  # which version of the estimate
    model: str  # its content hash
    recomputes: bool  # with gradient checkpointing
    date: str
    fixed: int = Field(ge=0, lt=2**63)  # estimated: weights, adapter, moments, libraries
    step: int = Field(ge=0, lt=2**63)  # estimated: what the largest micro-batch adds
    peak: int = Field(gt=0, lt=2**63)  # measured, all in all


@dataclass(frozen=True)
class LearnedMemory:
    """The observations of one kind of training, the oldest first."""

    kind: str = ""
    estimate: str = ""
    model: str = ""
    observations: tuple[Observation, ...] = ()

    def observation(self, recomputes: bool, fixed: int, step: int, peak: int) -> Observation:
        """What was observed just now."""
        return Observation(
            kind=self.kind,
            estimate=self.estimate,
            model=self.model,
            recomputes=recomputes,
            date=time.strftime("%Y-%m-%d"),
            fixed=fixed,
            step=step,
            peak=peak,
        )

    def with_observation(self, seen: Observation) -> "LearnedMemory":
        return replace(self, observations=(*self.observations, seen))

    def correction(self, recomputes: bool, fixed: int, step: int) -> int:
        """Bytes to add to an estimate of `fixed` and `step` bytes, with gradient checkpointing or without.

        It is `a + b * step`, with one b for trainings with checkpointing and one for those without: the likeliest by
        what was observed (ridge regression). Beforehand each is normal about 0, so that a single observation corrects
        both, each by as much as it may be off.
        """
        if not self.observations:
            return 0
        seen = self.observations
        weights = np.sqrt(self._weights())
        errors = np.array([one.peak - one.fixed - one.step for one in seen], float)
        terms = np.array([[1.0, one.step * (not one.recomputes), one.step * one.recomputes] for one in seen])
        beforehand = np.diag([1 / (_FIXED + _OF_FIXED * fixed), 1 / _STEP, 1 / _STEP])
        terms, errors = np.vstack([terms * weights[:, None], beforehand]), np.append(errors * weights, [0.0] * 3)
        a, *b = np.linalg.lstsq(terms, errors, rcond=None)[0].tolist()
        return round(max(a + b[recomputes] * step, -0.5 * (fixed + step)))

    def _weights(self) -> list[float]:
        """Of each observation: newer ones of the same model count most."""
        newer, found = Counter[str](), list[float]()
        for seen in reversed(self.observations):
            off = (_SAME if seen.model == self.model else _OTHER) * (1 + _OLDER * newer[seen.model])
            found.append(1 / (seen.peak * off) ** 2)
            newer[seen.model] += 1
        return found[::-1]

    def __str__(self) -> str:
        return summary(self.observations)


def summary(observations: Sequence[Observation]) -> str:
    """Such as "learned on this machine from 2 runs, the last on 2026-11-28"; nothing where nothing was learned."""
    if not observations:
        return ""
    runs = f"{len(observations)} run{'s' * (len(observations) > 1)}"
    return f"learned on this machine from {runs}, the last on {max(seen.date for seen in observations)}"


def learned(kind: str, estimate: str, model: str) -> LearnedMemory:
    """What was observed of a kind of training, under the same version of the estimate."""
    found = [seen for seen in observations() if (seen.kind, seen.estimate) == (kind, estimate)]
    return LearnedMemory(kind, estimate, model, tuple(found))


def observations() -> list[Observation]:
    """All that were kept, the oldest first."""
    path = _file()
    return _read(path) if path else []


def _read(path: Path) -> list[Observation]:
    """A file that cannot be read holds none, nor does a damaged line."""
    found: list[Observation] = []
    with suppress(OSError, UserError):
        for line in read_json_lines(path, ""):
            with suppress(ValidationError):
                found.append(Observation.model_validate(line))
    return found


def keep(seen: Observation) -> None:
    """Keep what says of which kind it is. Raises OSError where the cache cannot be written."""
    if (path := _file()) and seen.kind:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [one.model_dump_json() + "\n" for one in [*observations(), seen][-_KEPT:]]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def forget() -> list[Observation]:
    """Remove all observations, and return them: the cache's, while none is used. Raises OSError if that fails."""
    path = _file() or _cached()
    found = _read(path)
    path.unlink(missing_ok=True)
    return found


def _file() -> Path | None:
    given = os.environ.get(_FILE)
    return None if given == "0" else Path(given) if given else _cached()


def _cached() -> Path:
    return cache_folder() / "memory.jsonl"

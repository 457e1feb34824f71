"""What trainings on this machine have taken of memory, and by how much the next estimate is corrected for it.

Kept in the user's cache, for each kind of training. Nothing here stops a training.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

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
    fixed: int  # estimated: weights, adapter, moments, libraries
    step: int  # estimated: what the largest micro-batch adds
    peak: int  # measured, all in all


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
        """Bytes to add to an estimate of `fixed` and `step` bytes.

        It is `a + b * step`, the likeliest a and b by what was observed (ridge regression). Beforehand both are normal
        about 0, so one observation corrects both, each by as much as it may be off.
        """
        seen = [one for one in self.observations if one.recomputes == recomputes]
        if not seen:
            return 0
        weights = [self._weight(one, newer) for newer, one in zip(reversed(range(len(seen))), seen, strict=True)]
        steps = [float(one.step) for one in seen]
        errors = [float(one.peak - one.fixed - one.step) for one in seen]
        weighted = [weight * x for weight, x in zip(weights, steps, strict=True)]
        # the normal equations: aa * a + ab * b = a_error, ab * a + bb * b = b_error
        aa, ab = sum(weights) + 1 / (_FIXED + _OF_FIXED * fixed) ** 2, sum(weighted)
        bb = _dot(weighted, steps) + 1 / _STEP**2
        a_error, b_error = _dot(weights, errors), _dot(weighted, errors)
        determinant = aa * bb - ab * ab
        a, b = (bb * a_error - ab * b_error) / determinant, (aa * b_error - ab * a_error) / determinant
        return round(max(a + b * step, -0.5 * (fixed + step)))

    def _weight(self, seen: Observation, newer: int) -> float:
        off = _SAME if seen.model == self.model else _OTHER
        return 1 / (seen.peak * off * (1 + _OLDER * newer)) ** 2

    def __str__(self) -> str:
        return summary(self.observations)


def summary(observations: Sequence[Observation]) -> str:
    """Such as "learned on this machine from 2 runs, the last on 2026-11-28"; nothing where nothing was learned."""
    if not observations:
        return ""
    runs = f"{len(observations)} run{'s' * (len(observations) > 1)}"
    return f"learned on this machine from {runs}, the last on {max(seen.date for seen in observations)}"


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def learned(kind: str, estimate: str, model: str) -> LearnedMemory:
    """What was observed of a kind of training, under the same version of the estimate."""
    found = [seen for seen in observations() if (seen.kind, seen.estimate) == (kind, estimate)]
    return LearnedMemory(kind, estimate, model, tuple(found))


def observations() -> list[Observation]:
    """All that were kept, the oldest first. A file that cannot be read holds none, nor does a damaged line."""
    found: list[Observation] = []
    path = _file()
    with suppress(OSError, UserError):
        for line in read_json_lines(path, "") if path else []:
            with suppress(ValidationError):
                found.append(Observation.model_validate(line))
    return found


def keep(seen: Observation) -> None:
    """Raises OSError where the cache cannot be written."""
    if path := _file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [one.model_dump_json() + "\n" for one in [*observations(), seen][-_KEPT:]]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def forget() -> list[Observation]:
    """Remove all observations, and return them. Raises OSError where they cannot be removed."""
    found = observations()
    if path := _file():
        path.unlink(missing_ok=True)
    return found


def _file() -> Path | None:
    given = os.environ.get(_FILE)
    return None if given == "0" else Path(given) if given else cache_folder() / "memory.jsonl"

"""Verdicts on models of architectures that the backends have no layers of their own for (--try-model).

A verdict holds for one model and for the versions of the libraries whose layers compute it.
"""

import hashlib
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from common.files import atomic_write
from common.models.model_folder import ModelFolder
from common.system.cache import cache_folder

_CHECK = 4  # the version of the check; raised where it comes to compare something else
_LIBRARIES: tuple[str, ...] = ("torch", "transformers", "peft", "mlx", "mlx-lm")
_LIBRARIES += ("kernels", "mamba-ssm", "causal-conv1d", "flash-linear-attention")  # with which layers compute otherwise


class Verdict(BaseModel):
    """What a check found. checks: a line for each thing that was compared, by its name."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    architecture: str
    admitted: bool
    why: str = ""  # it is not, and in which layer the libraries part
    targets: list[str] = []  # the linear layers that can be adapted, by their last names
    checks: dict[str, str] = {}
    versions: dict[str, str] = {}


def remembered(model: ModelFolder, experts: bool = False) -> Verdict | None:
    """The verdict on this model with the libraries as they are installed; None where it was not tried with them.

    experts: with LoRA on the experts of a mixture. A model that was admitted so may be trained without.
    """
    for tried in [True] if experts else [False, True]:
        with suppress(OSError, UnicodeDecodeError, ValidationError):
            verdict = Verdict.model_validate_json(_file(model, tried).read_text(encoding="utf-8"))
            if verdict.admitted or tried == experts:
                return verdict
    return None


def remember(model: ModelFolder, verdict: Verdict, experts: bool = False) -> None:
    """Keep the verdict. Without room for it nothing is kept."""
    with suppress(OSError):
        path = _file(model, experts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(verdict.model_dump_json(indent=2), encoding="utf-8")


def folder() -> Path:
    """Where verdicts are kept."""
    return cache_folder() / "admitted"


def versions() -> dict[str, str]:
    """Of the libraries that compute such a model, as far as they are installed."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _file(model: ModelFolder, experts: bool) -> Path:
    tensors = sorted((name, tensor.dtype, tensor.shape) for name, tensor in model.tensors.items())
    given = [_CHECK, platform.machine(), model.written_config, tensors, versions()]
    text = json.dumps([*given, *(["experts"] if experts else [])], sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

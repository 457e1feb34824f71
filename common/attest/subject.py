"""The run that is attested or checked, with what several sections need of it."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Adapter
from common.context import Context
from common.errors import UserError
from common.llama_cpp.convert import convert
from common.llama_cpp.install import LlamaCpp, find, own_build
from common.llama_cpp.tool import without_log
from common.models.license import is_hub_name
from common.models.load import adapter_of, base_of, runnable
from common.models.model_folder import ModelFolder
from common.paths import source_name
from common.run_record import Run
from common.system.disk import require_disk
from common.system.environment import environment
from common.verify.cases import Cases, read_cases

Figures = dict[str, Any]  # by name: a text, a number, a list or None; or more of them

_MACHINE = ("processor", "threads", "packages", "llama.cpp", "backend")  # what decides rounding


@dataclass(frozen=True)
class Subject:
    """A run, and an empty folder for what is made again: nothing of the run is changed.

    texts: whether rows and answers are stated as text besides their hashes. again: what was measured when the run was
    verified is measured again, and not taken from its record. Each property raises UserError where it is not here.
    """

    run: Run
    context: Context
    scratch: Path
    texts: bool = False
    again: bool = False

    @cached_property
    def base(self) -> ModelFolder:
        return base_of(self.run, self.context.display)

    @cached_property
    def adapter(self) -> Adapter:
        return adapter_of(self.run, self.base)

    @cached_property
    def fused(self) -> ModelFolder:
        if not self.run.record.export.fused or not self.run.fused.is_dir():
            raise UserError(f"{self.run} has no fused folder.", f"python cli.py fuse {self.run}")
        return ModelFolder(self.run.fused)

    @cached_property
    def cases(self) -> Cases:
        if (kept := read_cases(self.run.verify_cases)) is None:
            raise UserError(f"{self.run.verify_cases} is missing or damaged.", "Give the complete run folder.")
        return kept

    def require_llama(self) -> LlamaCpp:
        """The one to convert and answer with; our own build has the tool that gives logits, and must be there too."""
        found = own_build() and find(self.context.llama_cpp)
        if found is None:
            raise UserError("llama.cpp is not built here.", "python cli.py llama build")
        return found

    @cached_property
    def bf16_gguf(self) -> Path:
        """That of the run, else made again of its fused folder, as it was when the quants were made of it."""
        record = self.run.record
        if kept := next((gguf.file for gguf in record.export.gguf if gguf.name == "BF16"), None):
            if not (self.run.path / kept).is_file():
                raise UserError(f"{self.run} has no {kept}.", f"python cli.py fuse {self.run}")
            return self.run.path / kept
        made, llama = self.scratch / "model-BF16.gguf", self.require_llama()
        require_disk([(self.scratch, "the bf16 GGUF", 2 * self.fused.parameter_count)], "Free some space.")
        with self.context.display.stage("the bf16 GGUF again") as progress:
            try:
                convert(self.run.fused, made, source_name(record.options.get("model") or ""), llama, progress)
            except UserError as error:
                raise without_log(error, made) from None
        return made

    def made(self) -> dict[str, Any]:
        """With what this machine computes, and the model's name on the hub where it has one."""
        record, here = self.run.record, environment()
        llama, plan = own_build() and find(self.context.llama_cpp), None
        try:
            plan = runnable(self.run.plan, self.run.recipe, self.context.backends)
        except UserError:
            pass  # neither backend is here
        return {
            "by": f"Twintune {version('twintune')}",
            "model": record.model if is_hub_name(record.model) else "a local model",
            **{name: here[name] for name in ("processor", "threads", "packages")},
            "llama.cpp": llama.version if llama else "none",
            "backend": f"{plan.backend} on {plan.device}" if plan else "none",
        }


def other_machine(made: dict[str, Any], here: dict[str, Any]) -> str:
    """Where the two round differently, such as `processor`; empty where they should not."""
    return ", ".join(name for name in _MACHINE if made.get(name) != here.get(name))


def digest(content: Any) -> str:
    """SHA-256 of ids, of a mask, or of anything that JSON takes."""
    if isinstance(content, np.ndarray):
        kind = np.uint8 if content.dtype == bool else "<i4"
        return hashlib.sha256(content.astype(kind).tobytes()).hexdigest()
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

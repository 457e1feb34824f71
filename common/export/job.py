"""An export under way: what it is made from, and what it has put on record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import run_record
from common.backend import Adapter
from common.context import Context
from common.display import Display
from common.export.fused_folder import ServingConfig
from common.llama_cpp.install import LlamaCpp
from common.models.model_folder import ModelFolder
from common.options import Options


@dataclass(frozen=True)
class ExportJob:
    """A finished run, and what --export asks of it. seconds: gets the time of each stage."""

    run: Path
    folder: ModelFolder  # the base model's
    final: Adapter
    options: Options
    served: ServingConfig
    llama: LlamaCpp | None
    seconds: dict[str, float]
    context: Context

    @property
    def display(self) -> Display:
        return self.context.display

    def kept(self) -> dict[str, Any]:
        """What is on record of this export and earlier ones."""
        found: dict[str, Any] = run_record.read_run(self.run).get("export", {})
        return found

    def keep(self, **made: Any) -> None:
        """Put on record what is made, as soon as it is: whatever fails after it, it is there and known."""
        run_record.update_run(self.run, export=self.kept() | made)

"""A running export: what it is made from."""

from dataclasses import dataclass

from common.backend import Adapter
from common.context import Context
from common.display import Display
from common.export.budget import Stage
from common.export.fused_folder import ServingConfig
from common.llama_cpp.install import LlamaCpp
from common.models.model_folder import ModelFolder
from common.options import Options
from common.run_record import Run


@dataclass(frozen=True)
class ExportJob:
    """A finished run and what to export of it."""

    run: Run
    base: ModelFolder
    adapter: Adapter  # what was trained
    options: Options
    served: ServingConfig
    stages: list[Stage]  # estimated
    llama: LlamaCpp | None
    seconds: dict[str, float]  # gets the time of each stage
    context: Context

    @property
    def display(self) -> Display:
        return self.context.display

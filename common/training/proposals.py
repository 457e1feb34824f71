"""Models that could be trained here, each with the plan by which it takes least time in the memory that is free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.display import gigabytes
from common.documents import read_yaml
from common.errors import UserError
from common.models.local_models import LocalModel, published_model
from common.models.mlx_quantized import scheme
from common.options import Options
from common.presets import preset_file, preset_names, published_configs
from common.training.model_estimate import Place, estimated_plan
from common.training.planner import ChosenPlan

_SHORTEST = 2  # tokens of a row


@dataclass(frozen=True)
class Proposal:
    model: LocalModel
    four_bits: bool = False  # the base is held in 4 bits, as it would not fit otherwise
    chosen: ChosenPlan | None = None  # None: nothing is known of the model's sizes yet

    @property
    def fits(self) -> bool:
        return self.chosen is None or self.chosen.prediction.peak <= self.chosen.budget

    def described(self) -> str:
        """`google/gemma-3-1b-it: 3.10 GB, fetches 2.00 GB from the hub`, short enough for a line of a terminal."""
        model = self.model
        if not model.is_here:
            return f"{model.name}: {self.memory()}, fetches {gigabytes(model.size)} from {model.where}"
        return f"{model.name}: {self.memory() if self.chosen else 'a GGUF, converted first'}, in {model.where}"

    def memory(self) -> str:
        """`3.10 GB`, or why nothing is known."""
        if self.chosen is None:
            return f"not known before it is {'converted' if self.model.is_here else 'fetched'}"
        return f"{gigabytes(self.chosen.prediction.peak)}{' over a base in 4 bits' if self.four_bits else ''}"


def preset_models(goal: str) -> list[LocalModel]:
    """Those of the presets for this goal."""
    found = [read_yaml(preset_file(name), "")["model"] for name in preset_names() if name.endswith(f"-{goal}")]
    return [published_model(name, published_configs()[name]) for name in found]


def propose(model: LocalModel, options: Options, sizes: Sequence[tuple[int, int]], place: Place) -> Proposal:
    """The model with its plan; over a base in 4 bits where it fits only so.

    sizes: `(tokens, label tokens)` of each row.
    """
    if model.config is None:
        return Proposal(model)
    longest = options.max_length
    sizes = [(max(_SHORTEST, min(tokens, longest)), min(labels, longest - 1)) for tokens, labels in sizes]
    if quantized := _own_scheme(model.config, place):
        return Proposal(model, False, estimated_plan(options, model.config, sizes, replace(place, scheme=quantized)))
    plan = Proposal(model, False, estimated_plan(options, model.config, sizes, place))
    if plan.fits or not (four_bits := _four_bits(place)):
        return plan
    lean = Proposal(model, True, estimated_plan(options, model.config, sizes, replace(place, scheme=four_bits)))
    return lean if lean.fits else plan


def _own_scheme(config: dict[str, Any], place: Place) -> str:
    """Of weights that MLX has quantized; torch trains over them in 16 bits."""
    own = scheme(config)
    return "" if own is None else own if place.backend == "mlx" else "none"


def _four_bits(place: Place) -> str:
    """The backend's scheme; empty where it has none here."""
    try:
        return place.package.quantization_scheme("4bit")
    except UserError:
        return ""

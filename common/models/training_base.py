"""The base model of a training, looked at but not loaded, and the adapter that training starts from."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.backend import Adapter
from common.display import Display
from common.errors import UserError
from common.models.adapter_files import names_experts, read_any
from common.models.admitted import Verdict, remembered
from common.models.experts import target_of
from common.models.families import is_known
from common.models.lora_init import Shapes, choose_layers, initial_adapter, validate
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes
from common.option_fields import EXPERTS
from common.options import Options
from common.paths import user_path
from common.recipe import Recipe


@dataclass(frozen=True)
class Base:
    model: ModelFolder  # in 16 or 32 bits
    training_base: Path  # what the backend loads: the same, or a quantized model of MLX
    scheme: str  # of its quantization, such as mlx-4bit-64, or none
    shapes: dict[str, tuple[int, int]]  # (out, in) of each layer that is adapted
    given: Adapter | None  # --adapter
    verdict: Verdict | None = None  # on a model of an unknown architecture (--try-model)


def find_base(options: Options, backend: str, scheme: str, display: Display) -> Base:
    """The model that --model names. scheme: as --quantization asks. Raises UserError where it cannot be trained."""
    model = resolve(options.model or "", display.say)
    training_base, scheme = _quantized_base(options, model.path, backend, scheme, display)
    verdict = None
    if not is_known(model.config):
        _check_plain(options, scheme)
        verdict = remembered(model, wants_experts(options))
    shapes = _adaptable(linear_shapes(model, options.targets), verdict)
    if wants_experts(options) and (verdict is None or not verdict.admitted):
        raise UserError(f"{options.model} was not tried with LoRA on its experts.", "Add --try-model.")
    if verdict and not shapes:
        raise UserError(
            f"--targets {' '.join(options.targets)}: none is among the layers with which the model was admitted.",
            f"Those are {', '.join(verdict.targets)}.",
        )
    given = _given_adapter(options, model, verdict) if options.adapter else None
    return Base(model, training_base, scheme, shapes, given, verdict)


def wants_experts(options: Options) -> bool:
    """Whether experts of a mixture are adapted, by --targets or in --adapter."""
    if not options.adapter:
        return EXPERTS in options.targets
    return names_experts(user_path(options.adapter, "--adapter"))


def _check_plain(options: Options, scheme: str) -> None:
    """UserError for what is not possible with an architecture that has no layers of the backends' own."""
    given = {"--quantization": scheme != "none", "--method full": options.method == "full"}
    if wrong := [name for name, present in given.items() if present]:
        raise UserError(f"{wrong[0]} is not possible yet with a model that was tried (--try-model).", "Leave it out.")


def _adaptable(shapes: Shapes, verdict: Verdict | None) -> Shapes:
    """Those of the layers that the verdict admits."""
    if verdict is None:
        return shapes
    return {module: shape for module, shape in shapes.items() if target_of(module) in verdict.targets}


def _quantized_base(options: Options, folder: Path, backend: str, scheme: str, display: Display) -> tuple[Path, str]:
    """`(what the backend loads, its scheme)`: MLX's own quantized weights where the model came in them."""
    if (found := quantized_source(folder)) is None:
        return folder, scheme
    quantized, known = found
    if options.method == "full":
        raise UserError(f"--method full: {options.model} is quantized ({known}).", "Give the 16-bit model.")
    if options.fuse_into == "base":
        raise UserError(f"--fuse-into base: {options.model} has no 16-bit weights.", "Leave --fuse-into out.")
    if backend != "mlx":
        display.warn(f"{options.model} is quantized by MLX ({known}); torch trains over its weights in 16 bits")
        return folder, scheme
    if options.quantization not in ("none", known.split("-")[1]):
        raise UserError(f"--quantization {options.quantization}: the model is {known} already.", "Leave it out.")
    return quantized, known


def _given_adapter(options: Options, model: ModelFolder, verdict: Verdict | None) -> Adapter:
    """--adapter. Raises UserError where it does not fit the base model."""
    every = linear_shapes(model, ["all-linear", *([EXPERTS] if verdict and EXPERTS in verdict.targets else [])])
    adapter = read_any(user_path(options.adapter or "", "--adapter"), model.config["num_hidden_layers"])
    validate(adapter, _adaptable(every, verdict), Path(options.adapter or ""))
    return adapter


def adapter_options(given: Adapter | None) -> dict[str, Any]:
    """What --adapter determines of the recipe; the most common rank and alpha stand for all of them."""
    if given is None:
        return {}
    rank, alpha = given.rank_and_alpha
    return {
        "rank": rank,
        "alpha": alpha,
        "rslora": next(iter(given.weights.values())).rslora,
        "method": "dora" if given.dora else "lora",
    }


def start_adapter(recipe: Recipe, base: Base) -> Adapter | None:
    """The adapter that training starts from; None where every weight is trained."""
    if recipe.method == "full":
        return None
    if base.given is not None:
        return replace(base.given, base_model=recipe.model, dropout=recipe.dropout)
    layers = base.model.config["num_hidden_layers"]
    return initial_adapter(choose_layers(base.shapes, recipe.layers, layers), layers, recipe)

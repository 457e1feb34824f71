"""Options that exclude each other, or have no effect together.

Options are validated by these functions, so this file cannot import Options.
"""

import re
from typing import Any

from common.option_fields import EXPERTS, NEED_IMATRIX, UNGUIDED, RecipeFields, extra_of

TAKEN_FROM_ADAPTER = sorted(("rank", "alpha", "rslora", "targets", "layers", "method", "rank_pattern", "alpha_pattern"))
_ADAPTER = [name for name, field in RecipeFields.model_fields.items() if extra_of(field)["heading"] == "Adapter"]
SHAPE = ["adapter", *(name for name in _ADAPTER if name != "method")]  # of the adapter


_ADDRESS = re.compile(r"([^\s:/]+|\[[0-9a-f:]+\]):\d{1,5}")


def faults_of(options: Any) -> list[str]:
    parts = (_of_tried, _of_data, _of_method, _of_devices, _of_export, _of_track)
    return [fault for part in parts for fault in part(options)]


def _of_tried(options: Any) -> list[str]:
    if not options.try_model:
        return []
    given = {"method full": options.method == "full", "devices": options.devices, "with": options.workers}
    return [f"try-model cannot be combined with {name} yet" for name, present in given.items() if present]


def _of_data(options: Any) -> list[str]:
    sources, weights, faults = options.data, options.weights, []
    if twice := [source for source in dict.fromkeys(sources) if sources.count(source) > 1]:
        faults.append(f"data: {', '.join(twice)} is given twice: to count its rows more, give it a weight")
    if weights and len(sources) < 2:
        faults.append("weights are for several sources of data, and there is one")
    elif weights and len(weights) != len(sources):
        faults.append(f"weights: {len(weights)} numbers for {len(sources)} sources of data: give one for each")
    if wrong := [weight for weight in weights if not weight > 0]:
        faults.append(f"weights: {wrong[0]:g} must be above 0; leave out a source that is not wanted")
    return faults


def _of_method(options: Any) -> list[str]:
    fields = type(options).model_fields
    changed = {name for name, field in fields.items() if getattr(options, name) != field.get_default()}
    faults = []
    if options.method == "dora" and EXPERTS in options.targets:
        faults.append("targets experts cannot be combined with method dora: mlx-lm has no DoRA of experts")
    if options.method == "full":
        faults += [f"{name} has no effect with method full: there is no adapter" for name in SHAPE if name in changed]
        if options.quantization != "none":
            faults.append("quantization cannot be combined with method full: quantized weights cannot be trained")
        if options.precision == "bf16":
            faults.append("method full keeps its weights in float32: in bf16 small updates are lost (precision fp32)")
    if options.adapter is not None:
        taken = [name for name in TAKEN_FROM_ADAPTER if name in changed]
        faults += [f"{name} is taken from --adapter: leave it out" for name in taken]
    return faults


def _of_devices(options: Any) -> list[str]:
    faults = []
    if options.devices is not None and options.workers:
        faults.append("devices and with cannot be combined: give one of them")
    if options.workers and options.method == "full":
        faults.append("with cannot be combined with method full: every weight would go out with each step")
    if wrong := [address for address in options.workers if not _ADDRESS.fullmatch(address)]:
        faults.append(f"with: {wrong[0]!r} is not HOST:PORT")
    return faults


def _of_export(options: Any) -> list[str]:
    faults = []
    given = {name: getattr(options, name) for name in ("imatrix", "imatrix_file", "install")}
    if options.export != "gguf":
        faults += [f"{name} is for a GGUF, and export is {options.export}" for name, value in given.items() if value]
    faults += _of_imatrix(options)
    if options.fuse_into and options.quantization == "none":
        faults.append("fuse_into is for a quantized base; there is none (quantization none)")
    return faults


def _of_track(options: Any) -> list[str]:
    faults = []
    if not options.track and not options.resume:  # a resumed run may have them
        idle = [name for name in ("track_project", "track_text", "track_artifacts") if getattr(options, name)]
        faults += [f"{name} is for trackers, and none is given (track)" for name in idle]
    if options.track_text and options.no_text:
        faults.append("track_text and no_text cannot be combined")
    if "report" in options.track_artifacts and not (options.track_text or options.no_text):
        faults.append("track_artifacts report: the report quotes rows and answers; give track_text as well, or no_text")
    if "adapter" in options.track_artifacts and options.method == "full":
        faults.append("track_artifacts adapter: method full makes no adapter")
    if options.track_artifacts and options.track == ["tensorboard"]:
        faults.append("track_artifacts: tensorboard keeps no files")
    if twice := [name for name in dict.fromkeys(options.track) if options.track.count(name) > 1]:
        faults.append(f"track: {twice[0]} is given twice")
    return faults


def _of_imatrix(options: Any) -> list[str]:
    name, faults = "imatrix" if options.imatrix else "imatrix_file", []
    if options.imatrix and options.imatrix_file:
        faults.append("imatrix and imatrix_file are both given: leave one out")
    if options.imatrix or options.imatrix_file:
        if all(quant in UNGUIDED for quant in options.quant):
            faults.append(f"{name} has no effect on {', '.join(options.quant)}")
    elif options.export == "gguf" and (needy := [quant for quant in options.quant if quant in NEED_IMATRIX]):
        faults.append(
            f"quant: {', '.join(needy)} cannot be made without an importance matrix: add --imatrix, which makes it "
            "from the training rows, or --imatrix-file FILE"
        )
    return faults


def valid_layers(text: str) -> bool:
    """Whether `--layers` can be read: `last:N`, or numbers and ranges with commas."""
    if re.fullmatch(r"last:[1-9]\d{,8}", text):
        return True
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text):
        return False
    return all(int(a) <= int(b or a) for a, _, b in (part.partition("-") for part in text.split(",")))

"""Options: what `train` takes. Each is declared once, here or in option_fields, for flags and YAML alike."""

import re
from typing import Literal

from pydantic import ByteSize, ConfigDict, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from common.errors import nearest
from common.option_faults import faults_of, valid_layers
from common.option_fields import (
    EXPERTS,
    QUANT_TYPES,
    ExportFields,
    PlanFields,
    RecipeFields,
    TrackFields,
    extra_of,
    in_data,
    in_memory,
    in_model,
    in_output,
    in_training,
)
from common.paths import path_fault, user_path
from common.presets import PRESETS
from common.recipe import TARGET_GROUPS

QUICKSTART = PRESETS / "quickstart.yaml"  # the built-in example
EXAMPLE = PRESETS.parent / "examples" / "data"  # its rows
_SIZE = TypeAdapter(ByteSize)


class Options(RecipeFields, PlanFields, ExportFields, TrackFields):
    """Everything `train` takes, from flags and YAML alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    config: str | None = in_model(None, "YAML file, or a preset by name (see init); flags win over it", value="FILE")
    model: str | None = in_model(
        None, "Hugging Face name, model folder or GGUF file of the base model", path=True, value="NAME"
    )
    try_model: bool = in_model(
        False,
        "check on this machine a model whose architecture is not supported, and train it by its libraries' own layers "
        "where both compute the same",
    )
    rehash: bool = in_model(False, "read all weights for the model's hash, though no file of it has changed")
    adapter: str | None = in_model(
        None,
        "adapter to train further (PEFT, mlx-lm or a run folder); rank, alpha and layers are the adapter's",
        path=True,
        value="PATH",
    )
    quantization: Literal["none", "4bit", "8bit"] = in_model(
        "none", "how the frozen base is held in memory: MLX's own quantization, or bitsandbytes' nf4 and int8"
    )
    chat_template: str | None = in_model(
        None,
        "chat template in place of the model's own, for base models without one: chatml, gemma, llama3 or a file",
        path=True,
        value="NAME",
    )

    data: list[str] = in_data(
        [],
        "training rows: JSONL, JSON, CSV, Parquet or text file, folder with train/valid/test files, or hub data set; "
        "several are mixed",
        path=True,
        value="SOURCE [SOURCE ...]",
    )
    valid_share: float = in_data(0.1, "share of the rows of one file that is kept for validation", ge=0, lt=1)
    field: dict[str, str] = in_data(
        {}, "names that the rows use for the parts of a row: instruction=question output=answer"
    )

    recipe: Literal["auto", "fixed"] = in_training(
        "auto",
        "what is not given of --learning-rate, --epochs, --batch-size and --rank: chosen for the model and the rows, "
        "or the plain defaults",
    )
    steps: int | None = in_training(None, "optimizer steps, instead of --epochs", ge=1)
    epochs: float | None = in_training(None, "passes over the training rows; plain default: 3", gt=0)
    warmup: float = in_training(0.05, "warm-up of the learning rate: a share of the steps below 1, else steps", ge=0)
    eval_every: int = in_training(
        0, "steps between validations; 0: four times an epoch, less often where that would take much time", ge=0
    )

    on_collapse: Literal["warn", "stop", "rollback"] = in_training(
        "warn",
        "when a training shows signs of collapse: say so; also save and stop; or continue from the best adapter at "
        "half the learning rate, at most three times",
    )
    sample_prompt: list[str] = in_training(
        [], "prompts that are answered at each validation, before those of validation rows", value="TEXT [TEXT ...]"
    )

    backend: Literal["auto", "mlx", "torch"] = in_memory("auto", "auto: MLX on Apple silicon, else PyTorch")
    device: str = in_memory(
        "auto",
        "auto: the GPU where the backend has one, the freest of several (mps only when asked for); "
        "cuda:1: PyTorch's second NVIDIA GPU",
        value="{auto,cpu,gpu,cuda,cuda:N,mps}",
        choices=("auto", "cpu", "gpu", "cuda", "mps"),
    )
    devices: str | None = in_memory(
        None,
        "devices of this machine that train together: a number, or all GPUs; changes speed and memory, never the "
        "result. On several machines: see docs/scale.md",
        value="N",
        choices=("all",),
    )
    shard: bool | None = in_memory(
        None, "shard the model over the devices (FSDP2); unless given, only where it does not fit on one of them"
    )
    workers: list[str] = in_memory(
        [],
        "other computers on which `worker` runs and helps; each computes a part of every step by its speed",
        alias="with",
        value="HOST:PORT [HOST:PORT ...]",
    )
    precision: Literal["auto", "bf16", "fp32"] = in_memory(
        "auto", "type of the frozen base's weights; the adapter and its optimizer are always float32"
    )
    memory_limit: str | None = in_memory(
        None, "memory that training may take, such as 16GB; most of what is free unless given", value="SIZE"
    )
    micro_batch_tokens: int | None = in_memory(
        None, "tokens computed at once, as memory allows unless given; changes speed and memory, never the result", ge=1
    )
    gradient_checkpointing: bool | None = in_memory(
        None,
        "keep only each layer's input and compute the rest again: less memory, a third more time. "
        "Unless given, only where memory is short",
    )

    output: str | None = in_output(
        None, "folder to make; unless given, in runs/, named after model, data and backend", value="DIR"
    )
    resume: str | None = in_output(
        None,
        "run folder to continue, with its own recipe and plan; to more steps in total with --steps or --epochs",
        value="RUN",
    )
    finish: bool = in_output(False, "with --resume: train no further, and export the best adapter so far")
    save_every: int = in_output(0, "steps between checkpoints; 0: at the end of each epoch", ge=0)
    no_text: bool = in_output(
        False, "keep no answer of the model and no row in samples.jsonl, report.json and report.html, only figures"
    )
    lang: Literal["en", "ja"] = in_output("en", "language of report.html")
    live: bool = in_output(
        False, "while training, show the report in a browser on this machine; its address is printed"
    )
    quiet: bool = in_output(False, "print only warnings, errors and the result")
    json_output: bool = in_output(False, "print one JSON object per event", alias="json")

    def mode(self) -> Literal["json", "quiet"] | None:
        """How the display prints; None: as the terminal allows."""
        return "json" if self.json_output else "quiet" if self.quiet else None

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("targets", "quant", "weights", "install", "track", "track_artifacts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return [name for part in parts for name in part.replace(",", " ").split()]
        return value

    @field_validator("rank_pattern", "alpha_pattern", "field", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, list):
            pairs = [str(part).partition("=") for part in parts]
            if bad := [name for name, equals, _ in pairs if not equals]:
                raise ValueError(f"{bad[0]!r} is not NAME=VALUE")
            names = [name for name, _, _ in pairs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} is given twice")
            return {name: number for name, _, number in pairs}
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if number <= 0:
                raise ValueError(f"{name}={number}: must be above 0")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|gpu|cuda(:\d{1,3})?|mps", value, re.ASCII):
            raise ValueError("must be auto, cpu, gpu, cuda, cuda:N (N counts from 0) or mps")
        return value

    @field_validator("devices", mode="before")
    @classmethod
    def _a_number_or_all(cls, value: object) -> object:
        text = None if value is None else str(value)
        if text is not None and text != "all" and not re.fullmatch(r"[1-9]\d{,3}", text, re.ASCII):
            raise ValueError("must be a number from 1, or all")
        return text

    @field_validator("model", "adapter", "chat_template", "data", "llama_cpp", "imatrix_file", "output", "resume")
    @classmethod
    def _possible_path(cls, value: str | list[str] | None) -> str | list[str] | None:
        for path in [value] if isinstance(value, str) else value or []:
            if fault := path_fault(path):
                raise ValueError(f"is not a path: {fault}")
        return value

    @field_validator("output", "resume")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        return str(user_path(value, "")) if value and value.startswith("~") else value

    @field_validator("mlx_bits", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return None if value is None else str(value).replace("_", "-")  # a number in YAML; mlx-lm's own mixed_4_6

    @field_validator("memory_limit", "split_size")
    @classmethod
    def _readable_size(cls, value: str | None) -> str | None:
        if value is not None:
            read_size(value)
        return value

    @field_validator("layers")
    @classmethod
    def _readable_layers(cls, value: str | None) -> str | None:
        if value is not None and not valid_layers(value):
            raise ValueError(f"{value!r} is neither last:N nor layer numbers such as 8-15 or 0-3,12")
        return value

    @field_validator("quant")
    @classmethod
    def _known_quants(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in QUANT_TYPES:
                known = ", ".join(QUANT_TYPES)
                raise ValueError(
                    f"{name!r} is not a GGUF type; {nearest(name.upper(), list(QUANT_TYPES))}known: {known}"
                )
        if not value:
            raise ValueError("names no GGUF type")
        return value

    @field_validator("install")
    @classmethod
    def _known_programs(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in ("ollama", "lmstudio")]:
            raise ValueError(f"{unknown[0]!r} is not a program to put a model into; known: ollama, lmstudio")
        return value

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str]) -> list[str]:
        known = [*TARGET_GROUPS, EXPERTS, *TARGET_GROUPS["all-linear"]]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is not a target; {nearest(name, known)}known: {', '.join(known)}")
        if not value:
            raise ValueError("names no module")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Options":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: leave one out")
        if faults := faults_of(self):
            raise ValueError("; ".join(faults))
        return self


def by_flag() -> dict[str, FieldInfo]:
    """The fields of Options by the names that flags and YAML use: its own first, then those of recipe and plan."""
    names = dict.fromkeys([*Options.__annotations__, *Options.model_fields])
    return {Options.model_fields[name].alias or name: Options.model_fields[name] for name in names}


PATHS = [name for name, field in by_flag().items() if extra_of(field)["path"]]
# What a resumed run may be given again, files only where they have moved; all else is its own recipe and plan.
RESUME_OPTIONS = {"steps", "epochs", "on_collapse", "model", "data", "adapter", "chat_template"} | {
    name
    for name, field in by_flag().items()
    if extra_of(field)["heading"] in ("Memory and device", "Export", "Output") and name not in ("precision", "output")
}


def read_size(text: str) -> int:
    """Bytes of `16GB`, `900 MB`, `1.5GiB` or a number of bytes. Raises ValueError."""
    try:
        size = int(_SIZE.validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"{text!r} is not a size such as 16GB or 900MB")
    if text.strip().isdecimal() and size < 1000:
        raise ValueError(f"{text!r} is {size} bytes: a size has a unit, as 16GB or 900MB")
    return size

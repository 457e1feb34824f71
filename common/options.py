"""Options: every option is declared once, here, and read from flags and YAML."""

import difflib
import re
import shutil
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import UserError
from common.option_aliases import FAMILIES, SAME, translate
from common.recipe import TARGET_GROUPS

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"  # the built-in example
EXAMPLE = ROOT / "examples" / "data"  # its rows
PATTERNS = ("rank_pattern", "alpha_pattern")
SHAPE = ("rank", "alpha", "dropout", "targets", "rslora", "layers", *PATTERNS, "lora_plus", "adapter")


UNGUIDED = ("BF16", "F16", "Q8_0")  # GGUF types that take no importance matrix


class Options(BaseModel):
    """Everything `train` takes, from flags and YAML alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str | None = Field(None, description="YAML file with these options; flags win over it")
    model: str | None = Field(None, description="Hugging Face name, a local model folder, or a GGUF file")
    data: str | None = Field(
        None,
        description="JSONL, JSON, CSV, Parquet or text file, folder with train/valid/test files, or hub data set",
    )
    output: str | None = Field(None, description="run folder; default runs/<model>-<data>-<backend>")
    resume: str | None = Field(None, description="run folder to go on with, by its own recipe and plan")

    backend: Literal["auto", "mlx", "torch"] = Field("auto", description="auto: MLX on Apple silicon, else torch")
    device: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        "auto", description="auto: the GPU where the backend has one (MPS only when asked for)"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the frozen base; the adapter and its optimizer are always float32"
    )
    memory_limit: str | None = Field(
        None,
        description="what training may take, such as 16GB: a plan is chosen that fits. Default: most of what is free",
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens computed at once; speed and memory, never the mathematics. Default: as memory allows",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="keep only each layer's input and compute the rest again: less memory, a third more time. Default: "
        "where memory is short",
    )
    on_swap: Literal["warn", "replan"] = Field(
        "warn", description="when swap grows during training: say what to change, or cut micro-batches finer at once"
    )

    field: dict[str, str] = Field(
        {}, description="what a part of a row is called here: instruction=question output=answer"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="loss on every assistant turn, on each row's last one, or on every token"
    )
    thinking: Literal["off", "keep"] = Field(
        "off", description="train and export a thinking model without its thoughts, or keep those in the rows"
    )
    chat_template: str | None = Field(
        None, description="chatml, gemma, llama3 or a file, in place of the model's own; for base models without one"
    )

    steps: int | None = Field(None, ge=1, description="optimizer steps, in place of --epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the training rows; 3 unless told otherwise")
    batch_size: int = Field(8, ge=1, description="rows per optimizer step")
    learning_rate: float = Field(2e-4, gt=0, description="the schedule's highest value")
    warmup: float = Field(0.05, ge=0, description="below 1: a share of the steps; from 1: steps")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    max_length: int = Field(
        1024, ge=2, description="tokens a row may have; --overflow says what becomes of longer ones"
    )
    overflow: Literal["drop", "truncate", "error"] = Field(
        "drop", description="rows longer than max_length are left out and counted, cut off, or not accepted"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the adapter's start, row order, validation split and dropout")

    rank: int = Field(16, ge=1, description="of the LoRA matrices")
    alpha: float = Field(32.0, gt=0, description="the adapter is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: list[str] = Field(["all-linear"], description="all-linear, attention, mlp, or names such as q_proj v_proj")
    method: Literal["lora", "dora", "full"] = Field(
        "lora", description="dora: LoRA with learned row lengths; full: train every weight of a small model"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank), so that large ranks learn as small ones do")
    layers: str | None = Field(None, description="adapt only last:N, or layer numbers from 0 such as 8-15 or 0-3,12")
    rank_pattern: dict[str, int] = Field(
        {}, description="other ranks by name: q_proj=8 layers.0.*=4; first match counts"
    )
    alpha_pattern: dict[str, float] = Field({}, description="other alphas by name, as rank_pattern")
    lora_plus: float = Field(1.0, gt=0, description="LoRA+: learning rate of the B matrices over that of A; try 16")
    adapter: str | None = Field(
        None,
        description="go on training this adapter (PEFT, mlx-lm or a run folder); it settles rank, alpha and layers",
    )
    quantization: Literal["none", "4bit", "8bit"] = Field(
        "none", description="of the frozen base in memory: MLX's own, or bitsandbytes' nf4 and int8"
    )
    fuse_into: Literal["base", "dequantized"] | None = Field(
        None, description="with a quantized base: fuse into the 16-bit base (default) or into the weights trained over"
    )

    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm; 0: never")

    valid_share: float = Field(0.1, ge=0, lt=1, description="held out by seed when --data is one file")
    eval_every: int = Field(0, ge=0, description="steps between validations; 0: at each epoch's end")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0: at each epoch's end")
    save_minutes: float = Field(
        10.0, ge=0, description="minutes after which a checkpoint is written all the same; 0: by steps alone"
    )

    export: Literal["none", "fused", "gguf", "lora-gguf", "mlx"] = Field(
        "gguf",
        description="what to make after training: the fused folder, with it a GGUF or a 4-bit mlx-lm folder, or the "
        "adapter alone as a GGUF that llama.cpp adds to the base model's",
    )
    quant: list[str] = Field(["Q4_K_M"], description="GGUF types to make, one or more")
    imatrix: bool = Field(
        False, description="weigh what to keep exact by an importance matrix of the training rows: model-<type>-imatrix"
    )
    no_verify: bool = Field(False, description="do not prove that the GGUF is what was trained (python cli.py verify)")
    llama_cpp: str | None = Field(None, description="folder of a llama.cpp build to use; else found or built once")
    push: str | None = Field(None, description="hub repository (owner/name) that the result is uploaded to at the end")
    push_public: bool = Field(False, description="a repository that --push makes is for everyone to see; else private")

    quiet: bool = Field(False, description="only warnings, errors and the result")
    json_output: bool = Field(False, alias="json", description="one JSON object per event on standard output")

    @field_validator("targets", "quant", mode="before")
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
                raise ValueError(f"{bad[0]!r} is no NAME=VALUE")
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

    @field_validator("memory_limit")
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

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, value: list[str]) -> list[str]:
        known = [*TARGET_GROUPS, *TARGET_GROUPS["all-linear"]]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is no target; {nearest(name, known)}known: {', '.join(known)}")
        if not value:
            raise ValueError("names no module")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Options":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: leave one out")
        changed = {n for n, field in type(self).model_fields.items() if getattr(self, n) != field.get_default()}
        faults = []
        if self.method == "full":
            faults += [f"{n} means nothing with method full: there is no adapter" for n in SHAPE if n in changed]
            if self.quantization != "none":
                faults.append("quantization cannot be combined with method full: quantized weights cannot be trained")
            if self.precision == "bf16":
                faults.append(
                    "method full keeps its weights in float32: in bf16 small updates are lost (precision fp32)"
                )
        if self.adapter is not None:
            settled = sorted({"rank", "alpha", "rslora", "targets", "layers", "method", *PATTERNS} & changed)
            faults += [f"{n} is settled by --adapter: leave it out" for n in settled]
        if self.imatrix and self.export != "gguf":
            faults.append(f"imatrix is for a GGUF, and export is {self.export}")
        if self.imatrix and all(quant in UNGUIDED for quant in self.quant):
            faults.append(f"imatrix means nothing for {', '.join(self.quant)}")
        if self.fuse_into and self.quantization == "none":
            faults.append("fuse_into is for a quantized base; there is none (quantization none)")
        if faults:
            raise ValueError("; ".join(faults))
        return self


# What a resumed run may be given again; all else is its own recipe and plan.
RESUME_OPTIONS = {"resume", "export", "quant", "llama_cpp", "fuse_into", "quiet", "json", "push", "push_public"}
RESUME_OPTIONS |= {"imatrix", "no_verify"}
RESUME_OPTIONS |= {"backend", "device", "micro_batch_tokens", "gradient_checkpointing", "save_every"}
RESUME_OPTIONS |= {"save_minutes", "memory_limit", "on_swap"}


def read_size(text: str) -> int:
    """Bytes from `16GB`, `900 MB` or a number of bytes; decimal units, GiB and MiB binary. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ") if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size such as 16GB or 900MB")
    return round(size)


def valid_layers(text: str) -> bool:
    """Whether `--layers` can be read: `last:N`, or numbers and ranges with commas."""
    if re.fullmatch(r"last:[1-9]\d*", text):
        return True
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        return False
    return all(int(a) <= int(b or a) for a, _, b in (part.partition("-") for part in text.split(",")))


def nearest(name: str, known: list[str]) -> str:
    """`did you mean X? ` where something is near, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def _fields() -> dict[str, Any]:
    return {(field.alias or name): field for name, field in Options.model_fields.items()}


def read_flags(argv: list[str]) -> dict[str, Any]:
    """`--batch-size 8 --targets q_proj v_proj --quiet` as a dict of texts, lists of texts and True.

    An option that takes several values may also be given several times.
    Values are not judged here: flags and YAML go through one validation, so that all faults are named together.
    """
    found: dict[str, Any] = {}
    key = None
    several = {name for name, field in _fields().items() if get_origin(field.annotation) in (list, dict)}
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in found and key not in several:
                raise UserError(f"--{name} is given twice.", "Give it once.")
            found.setdefault(key, []).extend([value] if equals else [])
        elif key is None:
            raise UserError(f"{word!r} stands where an option should.", "Options start with --, as in --model NAME.")
        else:
            found[key].append(word)
    return {name: (True if not v else v[0] if len(v) == 1 else v) for name, v in found.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML file's options. Raises UserError naming the file and, where YAML knows it, the line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file.", f"Look in {ROOT / 'configs'} for recipes.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}", "Correct the file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options.", "Write one `name: value` a line, as in configs/quickstart.yaml.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def load_options(flags: dict[str, Any]) -> tuple[Options, list[str]]:
    """Options from flags over YAML over defaults, and a line for every spelling that was translated.

    Without --config and --data the built-in example's recipe is the base. All faults of both sources are in one
    UserError.
    """
    config = flags.get("config")
    if config is None and "data" not in flags and "resume" not in flags:
        config = str(QUICKSTART)
    written = read_yaml(Path(config)) if isinstance(config, str) else {}
    notes: list[str] = []
    faults: list[str] = []
    sources: dict[str, str] = {}
    merged: dict[str, Any] = {}
    if isinstance(config, str):
        _anchor(written, Path(config))
        if written.pop("llama_cpp", None) is not None:  # the file may be a stranger's
            faults.append(f"{config}: llama_cpp names programs: give it by --llama-cpp or LLAMA_CPP_DIR, not in a file")
    for family in FAMILIES:  # their parts mean something only together: one in YAML, another among the flags
        if any(key in flags for key in family if key != "batch_size"):
            flags = {key: written.pop(key) for key in family if key in written} | flags
    if isinstance(nested := written.get("lora_parameters"), dict) and "rank" in flags:
        written["lora_parameters"] = nested | {"rank": flags["rank"]}  # mlx_lm's scale holds for any rank
    for source, values in ((config, written), ("", flags)):
        translated, said, wrong = translate(values)
        names = {SAME[key]: key for key in values if key in SAME}
        notes += [f"{source or 'flags'}: {line}" for line in said]
        faults += [f"{source}: {line}" if source else line for line in wrong]
        if {"steps", "epochs"} & translated.keys():
            merged.pop("steps", None)
            merged.pop("epochs", None)
        merged.update(translated)
        for key in translated:
            given = names.get(key, key)
            sources[key] = f"{source}: {given}" if source else f"--{given.replace('_', '-')}"
    options = _validate(merged, sources, faults)
    faults += _idle(flags, options) if options else []
    if options is None or faults:
        raise UserError("\n".join(faults), "`python cli.py train --help` lists every option and its values.")
    if options.resume and (extra := sorted(key for key in flags if SAME.get(key, key) not in RESUME_OPTIONS)):
        raise UserError(
            f"--resume goes on with the run's own recipe and plan; it cannot be combined with --{', --'.join(extra)}.",
            "Leave those out, or start a new run without --resume.",
        )
    return options, notes


def _idle(flags: dict[str, Any], options: Options) -> list[str]:
    """What is wrong with flags that can do nothing in this run; a YAML file may be used with several sets of flags."""
    exported, faults = options.export, []
    if exported != "gguf":
        idle = [f"--{name.replace('_', '-')}" for name in ("quant", "no_verify") if name in flags]
        faults += [f"{flag} is for a GGUF, and --export is {exported}" for flag in idle]
    if exported not in ("gguf", "lora-gguf") and "llama_cpp" in flags:
        faults.append(f"--llama-cpp is for a GGUF, and --export is {exported}")
    if "push_public" in flags and options.push is None:
        faults.append("--push-public is for what --push uploads, and there is no --push")
    if (
        "valid_share" in flags
        and options.valid_share > 0
        and options.data is not None
        and Path(options.data).expanduser().is_dir()
    ):
        faults.append(f"--valid-share is for one file, and --data {options.data} is a folder: put a valid file into it")
    return faults


def _anchor(written: dict[str, Any], config: Path) -> None:
    """A relative path in YAML that is not found from here may be meant from the YAML's own folder."""
    folder, ours = config.parent, config == QUICKSTART  # whatever lies where it is run: ours means our example
    paths = ("data", "model", "adapter", "chat_template")
    for key in [*paths, *(other for other, name in SAME.items() if name in paths)]:
        value = written.get(key)
        if isinstance(value, str) and (ours or not Path(value).exists()) and (folder / value).exists():
            found, here = (folder / value).resolve(), Path.cwd()
            written[key] = str(found.relative_to(here) if found.is_relative_to(here) else found)


def _validate(values: dict[str, Any], sources: dict[str, str], faults: list[str]) -> Options | None:
    known = _fields()
    for key in [key for key in values if key not in known]:
        faults.append(f"{sources[key]} is no option; {nearest(key, list(known))}".rstrip("; "))
        del values[key]
    flags = (bool, bool | None)
    for key in [key for key, value in values.items() if value is True and known[key].annotation not in flags]:
        faults.append(f"{sources[key]} needs a value")
        del values[key]
    if values.get("steps") is not None and values.get("epochs") is not None:
        faults.append("steps and epochs are both given: leave one out")
        del values["epochs"]
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            where = sources.get(key, key)
            got = f" (got {item['input']!r})" if key else ""
            faults.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}".removeprefix(": "))
        return None


def write_yaml(path: Path, content: BaseModel, comment: str) -> None:
    """Write atomically; the file is whole or not there."""
    import yaml

    temporary = path.with_suffix(".tmp")
    text = yaml.safe_dump(content.model_dump(), sort_keys=False, allow_unicode=True)
    temporary.write_text(f"# {comment}\n{text}", encoding="utf-8")
    shutil.move(temporary, path)


def is_example(data: str | None) -> bool:
    """Whether `--data` names the built-in example's rows."""
    return data is not None and Path(data).resolve() == EXAMPLE


def source_name(source: str | None) -> str:
    """What a model or data set is called in names of runs and files: its path, ending and revision left out."""
    name = Path(source or "").name
    return name.removesuffix(".gguf").removesuffix(".jsonl").partition(":")[0].partition("@")[0]

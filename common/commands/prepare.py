"""Everything that is settled before the first step: what could go wrong later is looked at here."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.backend import Adapter, Progress
from common.context import Context
from common.data.batching import steps_per_epoch
from common.data.dataset import Dataset, Example, data_hash, first_texts, prompt_of
from common.data.encode import (
    Encoded,
    Encoder,
    MaskingOptions,
    exported_template,
    load_tokenizer,
    stop_ids,
    template_hash,
)
from common.data.load import check_fields, load_data
from common.data.quality import quality_warnings
from common.data.truncation import FilteredRows, encode_all, filter_by_length
from common.display import Display, gigabytes
from common.errors import UserError
from common.export.budget import EXPORT_STEPS, Stage, check_disk, estimate_stages, warn_of_memory
from common.export.fused_folder import ServingConfig, checkpoints_disk, trained_bytes
from common.export.mlx import check_installed
from common.export.preflight import reloaded, tools_for
from common.export.upload import check_push
from common.llama_cpp.convert import check_quants
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import check_lora
from common.models.adapter_files import adapter_hash, read_any
from common.models.lora_init import choose_layers, initial_adapter, layer_count, validate
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.shapes import linear_shapes, target_names
from common.options import Options, source_name
from common.recipe import Plan, Recipe
from common.run_record import LOCK
from common.system.hardware import (
    INSTALL,
    Choice,
    choose_backend,
    choose_device,
    choose_precision,
    preload,
    quantization_scheme,
)
from common.training.metrics import timed
from common.training.planner import ChosenPlan, choose


@dataclass(frozen=True)
class Hardware:
    """What computes, each with the reason for it. scheme: of a quantized base, such as mlx-4bit-64, or none."""

    backend: Choice
    device: Choice
    precision: Choice
    scheme: str


@dataclass(frozen=True)
class Base:
    """The base model, looked at but not loaded."""

    folder: ModelFolder  # in 16 or 32 bits
    training_base: Path  # what the backend loads: the same, or a ready-made quantized one
    scheme: str
    shapes: dict[str, tuple[int, int]]  # (out, in) of each layer that is adapted
    given: Adapter | None  # --adapter
    tokenizer: Any


@dataclass(frozen=True)
class Tokenized:
    """The rows as ids and label masks, within --max-length. stops: the ids that end trained turns."""

    data: Dataset
    train: FilteredRows
    valid: FilteredRows
    stops: list[int]
    template: str | None  # that serves the model as it is trained; of plain text there is none


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first step."""

    options: Options
    run: Path
    folder: ModelFolder  # the base model in 16 or 32 bits
    training_base: Path  # what the backend loads: the same, or a ready-made quantized one
    recipe: Recipe
    chosen: ChosenPlan
    config: dict[str, Any]  # the language model's, normalized
    hardware: Hardware
    train: list[Encoded]
    valid: list[Encoded]
    start: Adapter | None  # None: every weight is trained
    llama: LlamaCpp | None
    served: ServingConfig
    sample: list[dict[str, Any]]  # a prompt to try the result with; of plain text there is none
    sample_tokens: int  # of the row that the prompt is from

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def prepare(options: Options, resumed: Path | None, context: Context, seconds: dict[str, float] | None = None) -> Job:
    """Everything that could go wrong later is looked at here, cheapest first. `seconds` gets what tokenizing took."""
    seconds = {} if seconds is None else seconds
    display = context.display
    _check_request(options, display)
    hardware = choose_hardware(options, display)
    run = resumed or _output(options, hardware.backend.value)
    data = _read_data(options, display)
    base = _look_at_base(options, hardware, display)
    with timed(seconds, "tokenize"), display.stage("read the data") as progress:
        rows = _tokenize(options, data, base.tokenizer, progress)
    _report_rows(options, rows, display)
    with display.stage("hash the model") as progress:
        recipe = _recipe(options, hardware, base, rows, base.folder.content_hash(progress))
    start = _start(recipe, base)
    config = base.folder.config | {"dtype": base.folder.dtype}
    chosen = choose(options, recipe, _plan(options, hardware, recipe, rows), config, start, rows.train.rows)
    if chosen.prediction.peak > chosen.budget:
        display.warn(
            f"training needs about {gigabytes(chosen.prediction.peak)}, and {gigabytes(chosen.budget)} may be taken "
            f"({chosen.why}): it may swap, or fail. Close other programs, lower --max-length or use --quantization 4bit"
        )
    adapter_bytes, held = trained_bytes(start, base.folder), reloaded(options, recipe, config, base.folder)
    proves = not options.no_verify
    after = estimate_stages(options.export, options.quant, base.folder, adapter_bytes, held, options.imatrix, proves)
    check_disk(run, [Stage("checkpoints", 0, checkpoints_disk(adapter_bytes)), *after])
    warn_of_memory(after, display)
    llama = tools_for(options, recipe.method, base.folder, display, base.tokenizer, first_texts(data.train, 200_000))
    sample, sample_tokens = _sample_prompt((data.valid, rows.valid), (data.train, rows.train))
    return Job(
        options=options,
        run=run,
        folder=base.folder,
        training_base=base.training_base,
        recipe=recipe,
        chosen=chosen,
        config=config,
        hardware=hardware,
        train=rows.train.rows,
        valid=rows.valid.rows,
        start=start,
        llama=llama,
        served=ServingConfig(rows.stops, rows.template),
        sample=sample,
        sample_tokens=sample_tokens,
    )


def _check_request(options: Options, display: Display) -> None:
    """What can be said of the options alone. Raises UserError."""
    check_quants(options.quant)
    if options.push:
        check_push(options.push, not options.push_public, display)
    if not options.model:
        raise UserError("No model is given.", "Add --model NAME (a hub name, a folder or a GGUF file).")
    if not options.data:
        raise UserError("No data is given.", "Add --data FILE.jsonl (or a folder with train.jsonl).")
    if "lora" in EXPORT_STEPS[options.export]:
        check_lora(options.method)
    if "mlx" in EXPORT_STEPS[options.export]:
        check_installed()


def choose_hardware(options: Options, display: Display) -> Hardware:
    """Backend, device and precision for the options. Raises UserError for what is not here, or cannot be combined."""
    backend = choose_backend(options.backend)
    device = choose_device(options.device, backend.value)
    if backend.value == "mlx" and device.value == "cpu" and not preload():
        display.warn(f"MLX will be about 15 times slower than need be: no OpenBLAS was found. {INSTALL}")
    precision = choose_precision(options.precision, backend.value, device.value)
    if options.method == "full" and options.precision == "auto":
        precision = Choice("fp32", "every weight is trained: in bf16 small updates would be lost")
    scheme = quantization_scheme(options.quantization, backend.value)
    if options.method == "dora" and scheme == "int8":
        raise UserError(
            "--method dora over bitsandbytes' int8 base: bitsandbytes cannot give the rows' lengths on every device.",
            "Use --quantization 4bit, or --method lora.",
        )
    return Hardware(backend, device, precision, scheme)


def _read_data(options: Options, display: Display) -> Dataset:
    check_fields(options.field)
    source = options.data or ""
    data = load_data(source, options.valid_share, options.seed, options.field)
    display.say(f"{source} read as: {data.described()}")
    for warning in quality_warnings(data):
        display.warn(str(warning))
    if options.valid_share and not data.valid and not Path(source).expanduser().is_dir():
        display.warn("nothing could be held out for validation: all rows have the same prompt")
    return data


def _look_at_base(options: Options, hardware: Hardware, display: Display) -> Base:
    folder = resolve(options.model or "", display.say)
    training_base, scheme = _ready_made(options, folder.path, hardware.backend.value, hardware.scheme, display)
    shapes = linear_shapes(folder, options.targets)
    given = _given_adapter(options, folder) if options.adapter else None
    return Base(folder, training_base, scheme, shapes, given, load_tokenizer(folder.path, options.chat_template))


def _tokenize(options: Options, data: Dataset, tokenizer: Any, progress: Progress) -> Tokenized:
    masking = MaskingOptions(options.train_on, options.thinking)
    encoder = Encoder(tokenizer, masking)
    train, valid = encode_all(data.train, encoder, progress), encode_all(data.valid, encoder)
    fitted, valid_fitted = (filter_by_length(part, options.max_length, options.overflow) for part in (train, valid))
    chats = any(row.text is None for row in data.train)  # plain text says nothing of how to be prompted
    template = exported_template(tokenizer, masking) if chats else None
    return Tokenized(data, fitted, valid_fitted, stop_ids(train), template)


def _report_rows(options: Options, rows: Tokenized, display: Display) -> None:
    """What became of the rows. Raises UserError where nothing is left to train on."""
    parts = rows.train, rows.valid
    for note, count in Counter(note for part in parts for row in part.every() for note in row.notes).items():
        display.say(f"{count} rows: {note}")
    if unlabeled := rows.train.unlabeled + rows.valid.unlabeled:
        display.warn(f"{len(unlabeled)} rows are left out, nothing in them is trained: {unlabeled[0].source} ...")
    if not rows.train.rows and not rows.train.dropped:
        raise UserError(
            f"--train-on {options.train_on}: nothing in {options.data} is trained.",
            "Look at it with check-data --explain 1; train: false and weight: 0 take turns out.",
        )
    if not rows.train.rows:
        raise UserError(
            f"--max-length {options.max_length}: every row of {options.data} is longer "
            f"(the shortest has {min(len(row.ids) for row in rows.train.every())} tokens).",
            "Raise --max-length.",
        )
    if rows.data.valid and not rows.valid.rows:
        display.warn("no validation row is left, so the last adapter is exported, not the best")
    for what in ("dropped", "truncated"):
        long = [row for part in parts for row in getattr(part, what)]
        if long:
            shown = ", ".join(f"{row.source} ({len(row.ids)})" for row in long[:5])
            more = f" and {len(long) - 5} more" if len(long) > 5 else ""
            display.warn(
                f"{len(long)} rows longer than --max-length {options.max_length} are {what}: {shown}{more} "
                "(check-data lists them all)"
            )


def _recipe(options: Options, hardware: Hardware, base: Base, rows: Tokenized, model_hash: str) -> Recipe:
    per_epoch = steps_per_epoch(len(rows.train.rows), options.batch_size)
    steps = options.steps or math.ceil((options.epochs or 3) * per_epoch)
    same = set(Recipe.model_fields) & set(Options.model_fields) - _RESOLVED
    return Recipe(
        **{name: getattr(options, name) for name in same} | _shape_of(base.given),
        model=options.model or "",
        data=options.data or "",
        model_hash=model_hash,
        data_hash=data_hash(rows.data),
        template_hash=template_hash(base.tokenizer),
        precision=hardware.precision.value,  # type: ignore[arg-type]  # pydantic checks it
        targets=target_names(base.shapes if base.given is None else dict.fromkeys(base.given.weights, (0, 0))),
        adapter_hash=adapter_hash(base.given) if base.given else "",
        quantization=base.scheme,
        steps=steps,
        warmup_steps=round(options.warmup * steps) if options.warmup < 1 else min(int(options.warmup), steps),
        eval_every=options.eval_every or per_epoch,
    )


def _plan(options: Options, hardware: Hardware, recipe: Recipe, rows: Tokenized) -> Plan:
    """A plan whose micro-batches are still to be chosen."""
    return Plan(
        backend=hardware.backend.value,  # type: ignore[arg-type]  # pydantic checks it
        device=hardware.device.value,  # type: ignore[arg-type]
        micro_batch_tokens=1,
        on_swap=options.on_swap,
        save_every=options.save_every or steps_per_epoch(len(rows.train.rows), recipe.batch_size),
        save_minutes=options.save_minutes,
    )


def _sample_prompt(*parts: tuple[list[Example], FilteredRows]) -> tuple[list[dict[str, Any]], int]:
    """`(the prompt of the first chat row that was kept complete, the tokens of that row)`; `([], 0)` without one."""
    for examples, fitted in parts:
        by_source = {example.source: example for example in examples}
        cut = {row.source for row in fitted.truncated}
        for row in fitted.rows:
            if row.source not in cut and by_source[row.source].text is None:
                return prompt_of(by_source[row.source]), len(row.ids)
    return [], 0


# What the recipe holds in another form than the options.
_RESOLVED = {"model", "data", "targets", "precision", "quantization", "steps", "eval_every"}


def _ready_made(options: Options, folder: Path, backend: str, scheme: str, display: Display) -> tuple[Path, str]:
    """`(what the backend loads, the scheme)`: MLX's own quantized weights where the model has come in them."""
    if (found := quantized_source(folder)) is None:
        return folder, scheme
    ready, known = found
    if options.method == "full":
        raise UserError(f"--method full: {options.model} is quantized ({known}).", "Give the 16-bit model.")
    if options.fuse_into == "base":
        raise UserError(f"--fuse-into base: {options.model} has no 16-bit weights.", "Leave --fuse-into out.")
    if backend != "mlx":
        display.warn(f"{options.model} is quantized by MLX ({known}); torch trains over its weights in 16 bits")
        return folder, scheme
    if options.quantization not in ("none", known.split("-")[1]):
        raise UserError(f"--quantization {options.quantization}: the model is {known} already.", "Leave it out.")
    return ready, known


def _start(recipe: Recipe, base: Base) -> Adapter | None:
    """The adapter that training begins with; None where every weight is trained."""
    if recipe.method == "full":
        return None
    if base.given is not None:
        return replace(base.given, base_model=recipe.model, dropout=recipe.dropout)
    return initial_adapter(choose_layers(base.shapes, recipe.layers), layer_count(base.shapes), recipe)


def _given_adapter(options: Options, folder: ModelFolder) -> Adapter:
    """--adapter, checked against the base model. Raises UserError where it is another model's."""
    every = linear_shapes(folder, ["all-linear"])
    adapter = read_any(Path(options.adapter or "").expanduser(), layer_count(every))
    validate(adapter, every, Path(options.adapter or ""))
    return adapter


def _shape_of(given: Adapter | None) -> dict[str, Any]:
    """What --adapter settles of the recipe; the most common rank and alpha stand for all: its hash tells the rest."""
    if given is None:
        return {}
    rank, alpha = given.rank_and_alpha
    return {
        "rank": rank,
        "alpha": alpha,
        "rslora": next(iter(given.weights.values())).rslora,
        "method": "dora" if given.dora else "lora",
    }


def _output(options: Options, backend: str) -> Path:
    if options.output:
        run = Path(options.output)
        check_unused(run)
        if run.exists() and (not run.is_dir() or any(path.name != LOCK for path in run.iterdir())):
            raise UserError(f"--output {run} is not an empty folder.", "Give a new or an empty folder.")
        return run
    return free_name(Path("runs") / f"{source_name(options.model)}-{source_name(options.data)}-{backend}")


def check_unused(run: Path) -> None:
    """Raises UserError where the folder holds a run."""
    if (run / "run.json").exists():
        raise UserError(
            f"--output {run} holds another run.",
            f"Go on with it (python cli.py train --resume {run}), or give another folder.",
        )


def free_name(run: Path) -> Path:
    """`run`, or the first of `run-2`, `run-3` ... that is not there."""
    name, number = run.name, 1
    while run.exists():
        number += 1
        run = run.with_name(f"{name}-{number}")
    return run

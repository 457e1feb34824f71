"""Everything that is checked and chosen before the first step: what could fail later fails here."""

from dataclasses import dataclass
from typing import Any

from common.backend import Adapter
from common.backend_package import Choice
from common.commands.run_folder import folder_of
from common.context import Context
from common.data.dataset import first_texts
from common.data.encode import Encoder, load_tokenizer
from common.data.encoded_rows import EncodedRows
from common.data.findings import QualityWarning, distinct_count
from common.data.sample_prompts import SamplePrompt, row_prompts
from common.data.summary import data_facts
from common.data.training_rows import (
    TrainingRows,
    encode_data,
    left_out,
    load,
    report_rows,
    warn_of_context,
    warn_of_quality,
)
from common.data.verdict import of_rows, of_warnings, serious_line
from common.display import Display, gigabytes
from common.errors import UserError
from common.export.budget import EXPORT_STEPS, Stage, check_disk, needs_llama, warn_of_memory
from common.export.fused_folder import ServingConfig, checkpoints_disk, trained_bytes
from common.export.mlx import check_installed
from common.export.preflight import export_stages, tools_for
from common.export.upload import check_push
from common.files import tree_bytes
from common.llama_cpp.build import build_bytes
from common.llama_cpp.imatrix import check_imatrix_rows
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import check_lora
from common.models.families import context_length
from common.models.training_base import Base, find_base, start_adapter, wants_experts
from common.option_sources import options_over
from common.options import Options
from common.recipe import VERSION, Parent, Plan, Recipe
from common.report.tracking import check_trackers
from common.run_fields import ReportFacts
from common.run_record import Run
from common.system.hardware import choose_backend
from common.training.auto_recipe import auto_recipe
from common.training.memory_estimate import TrainingMemory, dims_of
from common.training.metrics import timed
from common.training.planner import ChosenPlan, choose_plan
from common.training.setup import ENOUGH, make_plan, make_recipe
from common.verify.admission import try_model
from common.verify.cases import Cases, make_cases

_PROMPTS = 3  # by which a training is watched


@dataclass(frozen=True)
class Hardware:
    """What computes, each with the reason for it. scheme: of a quantized base, such as mlx-4bit-64, or none."""

    backend: Choice
    device: Choice
    precision: Choice
    scheme: str


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first step."""

    options: Options
    run: Run
    base: Base
    recipe: Recipe
    chosen: ChosenPlan
    config: dict[str, Any]  # the language model's, normalized
    hardware: Hardware
    memory: TrainingMemory
    train: EncodedRows
    valid: EncodedRows
    test: EncodedRows
    start: Adapter | None  # None: every weight is trained
    stages: list[Stage]  # of the export, estimated
    llama: LlamaCpp | None
    served: ServingConfig
    prompts: list[SamplePrompt]  # of rows; none for plain text
    encoder: Encoder
    cases: Cases
    left_out: str  # a line for the end, where many rows are not trained on
    facts: ReportFacts

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def prepare(
    options: Options,
    resumed: Run | None,
    context: Context,
    seconds: dict[str, float] | None = None,
    parent: Parent | None = None,
) -> Job:
    """The job, after every check, cheapest first. seconds: gets the time of tokenizing. Raises UserError."""
    seconds = {} if seconds is None else seconds
    display = context.display
    check_request(options, display)
    hardware = choose_hardware(options, context)
    run = resumed or Run(folder_of(options, hardware.backend.value))
    base, rows, tokenizer, suspicious = model_and_rows(options, hardware, context, seconds)
    recipe_why = ""
    if not resumed:
        options, recipe_why = _chosen(options, base, rows, display)
    version = resumed.recipe.version if resumed else VERSION
    recipe = _recipe(options, base, rows, hardware.precision.value, parent, version, display)
    start = start_adapter(recipe, base)
    config = base.model.config | {"dtype": base.model.dtype}
    plan = make_plan(options, hardware.backend.value, hardware.device.value, rows)
    package = context.backends(plan.backend)
    memory = TrainingMemory(package, dims_of(base.model), recipe, start, len(options.workers))
    if not resumed:  # a run that was planned before it was learned continues by its plan
        memory = memory.with_learned(plan)
    chosen = choose_plan(options, memory, plan, rows.train.rows, rows.scored, _as_begun(options, plan, resumed))
    _warn_of_peak(chosen, display)
    stages = export_stages(options, base.model, start, memory)
    checkpoints = checkpoints_disk(trained_bytes(start, base.model), options.keep_checkpoints)
    checkpoints = max(0, checkpoints - tree_bytes(run.path / "checkpoints"))  # those of a run that is resumed
    build = build_bytes(needs_llama(options.export), options.llama_cpp)
    check_disk(run.path, [Stage("checkpoints", 0, checkpoints), *stages], build)
    warn_of_memory(stages, display)
    llama = tools_for(options, recipe.method, base.model, display, tokenizer, first_texts(rows.data.train, 200_000))
    return Job(
        options=options,
        run=run,
        base=base,
        recipe=recipe,
        chosen=chosen,
        config=config,
        hardware=hardware,
        memory=memory,
        train=rows.train.rows,
        valid=rows.scored,
        test=rows.test.rows,
        start=start,
        stages=stages,
        llama=llama,
        served=ServingConfig(rows.stops, rows.template, recipe.thinking),
        prompts=row_prompts(rows, _PROMPTS),
        encoder=rows.encoder,
        cases=make_cases(rows.data, rows.valid, rows.train, rows.encoder),
        left_out=left_out(rows),
        facts=ReportFacts(
            data=data_facts(options, rows, suspicious, tokenizer), reasons=_reasons(hardware, chosen, recipe_why)
        ),
    )


def _as_begun(options: Options, plan: Plan, resumed: Run | None) -> bool:
    """Whether the plan's memory is that of a run that is resumed."""
    if resumed is None:
        return False
    before, limit = resumed.plan, options_over(resumed.record.options, {}).memory_limit
    given = (options.micro_batch_tokens, options.gradient_checkpointing, options.memory_limit, plan.device)
    return given == (before.micro_batch_tokens, before.gradient_checkpointing, limit, before.device)


def model_and_rows(
    options: Options, hardware: Hardware, context: Context, seconds: dict[str, float]
) -> tuple[Base, TrainingRows, Any, list[QualityWarning]]:
    """`(the model, its rows encoded, its tokenizer, what is suspicious)`, each reported.

    seconds: gets the time of tokenizing.
    """
    display = context.display
    data = load(options, display)
    suspicious = warn_of_quality(options, data, display)
    if options.try_model:
        try_model(options.model or "", context, wants_experts(options))
    base = find_base(options, hardware.backend.value, hardware.scheme, display)
    if base.given is not None and base.given.dora:
        _check_dora(hardware.scheme)
    tokenizer = load_tokenizer(base.model.path, options.chat_template)
    with timed(seconds, "tokenize"), display.stage("tokenize the data") as progress:
        rows = encode_data(options, data, tokenizer, progress)
    if options.imatrix and options.export == "gguf":
        check_imatrix_rows(int(rows.train.rows.lengths.sum()))
    _report(options, rows, suspicious, base, display)
    return base, rows, tokenizer, suspicious


def _report(
    options: Options, rows: TrainingRows, suspicious: list[QualityWarning], base: Base, display: Display
) -> None:
    """Say what is changed, left out or unfit. Raises UserError where nothing is left to train on."""
    report_rows(options, rows, display)
    if serious := serious_line([*of_warnings(suspicious, distinct_count(rows.data)), *of_rows(options, rows)]):
        display.warn(serious)
    kept = [part.rows for part in (rows.train, rows.valid, rows.test)]
    warn_of_context(kept, context_length(base.model.config), display)


def _chosen(options: Options, base: Base, rows: TrainingRows, display: Display) -> tuple[Options, str]:
    """`(the options with what --recipe auto chooses, why)`."""
    if options.recipe == "fixed":
        return options, ""
    options, why = auto_recipe(options, base, rows.train.rows)
    if why:
        display.say(why)
    return options, why


def _recipe(
    options: Options,
    base: Base,
    rows: TrainingRows,
    precision: str,
    parent: Parent | None,
    version: int,
    display: Display,
) -> Recipe:
    with display.stage("hash the model") as progress:
        recipe = make_recipe(options, base, rows, precision, progress, parent, version)
    if not rows.scored:
        display.say(
            "there are no validation rows: training goes through all its steps, the last adapter is exported, and the "
            "model is not asked in between"
        )
    elif options.patience > recipe.patience:
        display.say(
            f"{len(rows.scored)} validation rows are too few to stop by (at least {ENOUGH}): training goes through all "
            "its steps, and the adapter with the lowest validation loss is exported"
        )
    return recipe


def check_request(options: Options, display: Display) -> None:
    """Raises UserError for what can be known to fail from the options alone."""
    if options.push:
        check_push(options.push, not options.push_public, display)
    if not options.model:
        raise UserError("No model is given.", "Add --model NAME (a hub name, a folder or a GGUF file).")
    if not options.data:
        raise UserError("No data is given.", "Add --data FILE.jsonl (or a folder with train.jsonl).")
    check_trackers(options.track)
    if "lora" in EXPORT_STEPS[options.export]:
        check_lora(options.method)
    if "mlx" in EXPORT_STEPS[options.export]:
        check_installed()


def choose_hardware(options: Options, context: Context) -> Hardware:
    """Backend, device and precision. Raises UserError for what is not here, or cannot be combined."""
    backend = choose_backend(options.backend, context.backends)
    package = context.backends(backend.value)
    device = package.choose_device(options.device)
    precision = package.choose_precision(options.precision, device.value)
    for choice in (backend, device):
        if choice.warning:
            context.display.warn(choice.warning)
    if options.method == "full" and options.precision == "auto":
        precision = Choice("fp32", "every weight is trained: in bf16 small updates would be lost")
    scheme = package.quantization_scheme(options.quantization)
    if options.method == "dora":
        _check_dora(scheme)
    return Hardware(backend, device, precision, scheme)


def _check_dora(scheme: str) -> None:
    if scheme == "int8":
        raise UserError(
            "DoRA over bitsandbytes' int8 base: bitsandbytes cannot give the rows' lengths on every device.",
            "Use --quantization 4bit, or LoRA without DoRA.",
        )


def _reasons(hardware: Hardware, chosen: ChosenPlan, recipe: str) -> dict[str, str]:
    names = ("backend", "device", "precision")
    whys = {name: getattr(hardware, name).why for name in names} | {"memory budget": chosen.why, "recipe": recipe}
    return {name: why for name, why in whys.items() if why}


def _warn_of_peak(chosen: ChosenPlan, display: Display) -> None:
    if chosen.prediction.peak > chosen.budget:
        display.warn(
            f"training needs about {gigabytes(chosen.prediction.peak)}, and {gigabytes(chosen.budget)} may be taken "
            f"({chosen.why}): it may swap, or fail. Close other programs, lower --max-length or use --quantization 4bit"
        )

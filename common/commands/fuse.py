"""After training: fuse, export, try the GGUF, count the example; and `fuse RUN`, the same again."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from common import run_record
from common.backend import Adapter
from common.commands.arguments import add_options
from common.commands.example_score import score
from common.context import Context
from common.data.load import data_of
from common.display import Display, gigabytes
from common.errors import UserError
from common.export.budget import EXPORT_STEPS, Stage, StageMeter, check_disk, estimate_stages, warn_of_memory
from common.export.fused_folder import ServingConfig, trained_bytes, write_fused
from common.export.gguf import WHOLE, try_gguf, write_ggufs, write_lora
from common.export.job import ExportJob
from common.export.mlx import write_mlx
from common.export.model_card import base_form, parts_of, write_card
from common.export.preflight import reloaded, tools_for
from common.export.upload import check_push, push
from common.llama_cpp.convert import check_quants
from common.models import adapter_files as adapters
from common.models.license import Terms, copy_terms, find_terms
from common.models.load import TEMPLATE, base_of, loaded, runnable, say_llama
from common.models.lora_init import layer_count, validate
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.option_sources import options_over
from common.options import Options, is_example
from common.run_record import held
from common.system.hardware import choose_backend, choose_device
from common.training.metrics import timed
from common.verify.verify import verdict, verify_held


def fuse_run(run: Path, options: dict[str, Any], context: Context) -> None:
    """`fuse RUN`: the fused folder and the GGUFs again, from the run's adapter."""
    run_record.read_complete(run)
    with held(run):
        merged = _fuse_held(run, options, context)
    if merged.push:
        push(run, merged.push, None, not merged.push_public, False, context.display)


def _fuse_held(run: Path, options: dict[str, Any], context: Context) -> Options:
    display = context.display
    known = run_record.read_complete(run, "options", "model_hash", "stop_ids", "sample_prompt")
    say_llama(known, context.llama_cpp, display)
    if options.get("fuse_into") and known["options"].get("quantization", "none") == "none":
        raise UserError(
            f"--fuse-into {options['fuse_into']}: {run} had no --quantization: its base comes in one form only.",
            "Leave --fuse-into out.",
        )
    if options.get("export") == "none":
        raise UserError("--export none: fuse would make nothing.", "Leave --export out, or name what to make.")
    if (options.get("quant") or options.get("imatrix")) and "export" not in options:
        options = options | {"export": "gguf"}  # what those are for
    # What is checked, weighed and uploaded is asked for each time, not taken from how the run was started.
    fresh = {"imatrix": False, "no_verify": False, "push": None, "push_public": False}
    merged = options_over(known["options"] | fresh, options)
    if merged.export == "none":  # how the run was started; who asks for a fusion wants the whole way
        merged = merged.model_copy(update={"export": "gguf"})
    check_quants(merged.quant)
    if merged.push:
        check_push(merged.push, not merged.push_public, display)
    folder = base_of(run, known, display)
    shapes = linear_shapes(folder, run_record.read_recipe(run).targets)
    final = adapters.read_trained(run, layer_count(shapes))
    validate(final, shapes, run / "adapter")
    recipe = run_record.read_recipe(run)
    if "convert" in EXPORT_STEPS[merged.export] and (merged.imatrix or not merged.no_verify):
        data_of(run, merged, recipe)
    if "convert" in EXPORT_STEPS[merged.export] and not merged.no_verify:
        runnable(run_record.read_plan(run), recipe)
    after = _estimated(run, folder, final, merged)
    check_disk(run, after)
    warn_of_memory(after, display)
    llama = tools_for(merged, final.method, folder, display)
    template = run / TEMPLATE
    served = ServingConfig(known["stop_ids"], template.read_text(encoding="utf-8") if template.exists() else None)
    finish(ExportJob(run, folder, final, merged, served, llama, {}, context))
    return merged


def finish(job: ExportJob) -> None:
    """Make what --export asks for and, for the built-in example, count; recorded in run.json."""
    run, options, display = job.run, job.options, job.display
    through, meter = (
        EXPORT_STEPS[options.export],
        StageMeter(_estimated(run, job.folder, job.final, options), job.seconds),
    )
    terms = _record_base(job)
    if "fuse" in through:
        _write_fused(job, meter)
    if "convert" in through and job.llama is not None:
        write_ggufs(job, job.llama, meter)
        with timed(job.seconds, "try"):
            try_gguf(job, job.llama)
    if "lora" in through and job.llama is not None:
        write_lora(job, job.llama, meter)
    if "mlx" in through:
        _write_mlx(job, meter)
    _write_documents(job, terms)
    broken = "convert" in through and not _proven(job, meter)
    if through:
        job.keep(stages=job.kept().get("stages", {}) | meter.record())
    if "convert" in through and job.llama is not None and is_example(options.data):
        with timed(job.seconds, "example"):
            counts = score(run, job.folder.path, job.kept()["gguf"][0], job.llama, display)
        run_record.update_run(run, example=counts)
    record_seconds(run, job.seconds)
    meter.show(display)
    display.event("done", run=str(run), stage_seconds=job.seconds)
    if display.mode in ("rich", "plain"):
        _closing(run_record.read_run(run), job.seconds, display)
        display.say(f"The run is in {run}")
    if broken:
        raise UserError(
            f"{run}: the GGUF does not hold what was trained; the checks above and run.json say where.",
            f"The adapter is complete. Fix what they name, then: python cli.py fuse {run}",
        )


def _record_base(job: ExportJob) -> Terms:
    """The base's license, on record with the form that its weights come in."""
    folder, model = job.folder.path, job.options.model or ""
    terms = find_terms(folder, model, job.folder.model_type)
    run_record.update_run(job.run, base={"terms": asdict(terms), "form": base_form(folder, model)})
    return terms


def _write_fused(job: ExportJob, meter: StageMeter) -> None:
    out = job.run / "fused"
    with (
        meter.stage("fuse", out),
        _replaced(job) as replaced,
        job.display.stage("fuse") as progress,
    ):
        write_fused(job.folder, job.final, out, job.served, progress, replaced)
    run_record.update_run(job.run, verify=None)  # of what was there before
    if job.kept().get("fuse_into") != job.options.fuse_into:
        job.keep(gguf=[])  # those of the other form
    job.keep(fused=out.name, fuse_into=job.options.fuse_into)


def _write_mlx(job: ExportJob, meter: StageMeter) -> None:
    out = job.run / "mlx"
    with meter.stage("mlx", out), job.display.stage("mlx") as progress:
        made = write_mlx(job.run / "fused", out, progress)
    job.keep(mlx=made)
    job.display.say(
        f"mlx-lm, {made['bits']} bits, {gigabytes(made['bytes'])}: python -m mlx_lm generate --model {out} --prompt ..."
    )


def _write_documents(job: ExportJob, terms: Terms) -> None:
    """License files beside all weights, and the fused folder's card."""
    parts = parts_of(job.run)
    for part in {*parts, "gguf", "mlx"}:
        if (job.run / part).is_dir():
            copy_terms(job.folder.path, job.run / part, terms)
    if "fused" in parts:
        write_card(job.run, job.run / "fused" / "README.md", parts)


def _proven(job: ExportJob, meter: StageMeter) -> bool:
    """Verify the GGUFs unless the user said no, and remove the bf16 one where it was not asked for."""
    whole = job.run / "gguf" / WHOLE
    try:
        if job.options.no_verify:
            return True
        with meter.stage("verify", job.run / "gguf" / "none"):
            checks = verify_held(job.run, job.context, whole)
        return verdict(checks) != "broken"
    finally:
        if str(whole.relative_to(job.run)) not in [report["file"] for report in job.kept()["gguf"]]:
            whole.unlink(missing_ok=True)


def _estimated(run: Path, folder: ModelFolder, final: Adapter, options: Options) -> list[Stage]:
    held = reloaded(options, run_record.read_recipe(run), folder.config, folder)
    size, verifies = trained_bytes(final, folder), not options.no_verify
    return estimate_stages(options.export, options.quant, folder, size, held, options.imatrix, verifies)


def _closing(run: dict[str, Any], seconds: dict[str, float], display: Display) -> None:
    """What it took, beside the estimate."""
    whole = sum(seconds.values()) or 1.0
    figures = {"time": ", ".join(f"{name} {value:.1f} s ({value / whole:.0%})" for name, value in seconds.items())}
    if "train" in seconds:
        if run["tokens_per_second"]:  # of one step there is none
            speeds = run["tokens_per_second"], run["label_tokens_per_second"]
            figures["speed"] = f"{speeds[0]:.0f} tokens/s, {speeds[1]:.0f} of them labels"
        figures["memory"] = (
            f"peak {gigabytes(run['peak_memory_bytes'])}, estimated {gigabytes(run['predicted_peak_bytes'])} "
            f"({run['predicted_peak_bytes'] / max(1, run['peak_memory_bytes']) - 1:+.0%}); "
            f"the whole process {gigabytes(run['peak_rss_bytes'])}"
        )
        figures["padding"] = f"none in the layers' products, {run['padding_fraction']:.1%} of attention's positions"
    display.panel("Done", figures)


@contextmanager
def _replaced(job: ExportJob) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """What stands in for the 16-bit base's weights: nothing, or with --fuse-into dequantized those trained over."""
    run, folder, display = job.run, job.folder, job.display
    recipe = run_record.read_recipe(run)
    if recipe.quantization == "none":
        yield {}
    elif quantized_source(folder.path) is not None:
        display.say(f"The adapter goes into the model's dequantized {recipe.quantization} weights: it has no others.")
        yield {}
    elif job.options.fuse_into != "dequantized":
        display.say(
            f"The adapter goes into the 16-bit base, which is better than the {recipe.quantization} one it was trained "
            "over, but not the same; --fuse-into dequantized gives what training saw."
        )
        yield {}
    else:
        display.say(f"The adapter goes into the dequantized {recipe.quantization} weights that it was trained over.")
        plan = run_record.read_plan(run)
        if (plan.backend == "mlx") != recipe.quantization.startswith("mlx"):
            raise UserError(f"{run}: plan.yaml says {plan.backend}, its base is {recipe.quantization}.", "Undo that.")
        choose_backend(plan.backend)  # a run may have come from another machine
        device = choose_device("auto", plan.backend).value
        backend, _ = loaded(job.context, recipe, plan.model_copy(update={"device": device}), folder.path, job.final)
        try:
            yield backend.dequantized()
        finally:
            backend.close()


def record_seconds(run: Path, seconds: dict[str, float]) -> None:
    """Into run.json: the training of a run's processes adds up, of any other stage the last time counts."""
    earlier = run_record.read_run(run).get("stage_seconds", {})
    for stage in {"train", "evaluate", "save"} & seconds.keys():
        seconds[stage] += earlier.get(stage, 0.0)
    run_record.update_run(run, stage_seconds=earlier | seconds)


_OPTIONS = ("llama_cpp", "export", "quant", "imatrix", "fuse_into", "no_verify", "push", "push_public")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RUN [--option VALUE ...]"
    parser.epilog = "What is not given is as the run was started; a run that exported nothing makes a GGUF."
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    add_options(parser, _OPTIONS, dict.fromkeys(_OPTIONS))


def run(args: argparse.Namespace, context: Context) -> None:
    llama_cpp = args.flags.get("llama_cpp", context.llama_cpp)
    fuse_run(args.run, args.flags, replace(context, llama_cpp=llama_cpp))

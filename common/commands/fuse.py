"""After training: fuse, export, try the GGUF, verify; and `fuse RUN`, the same again."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.backend_package import Backends
from common.commands.arguments import add_options
from common.context import Context
from common.data.sources import data_of
from common.display import gigabytes
from common.errors import PROGRAM, Unable, UserError
from common.export.budget import EXPORT_STEPS, StageMeter, check_disk, needs_llama, warn_of_memory
from common.export.fused_folder import ServingConfig, write_fused
from common.export.gguf import kept_matrix, try_gguf, write_ggufs, write_lora
from common.export.install import install
from common.export.job import ExportJob
from common.export.mlx import scheme_of, write_mlx_model
from common.export.model_card import base_form, parts_of, write_card
from common.export.preflight import export_stages, tools_for
from common.export.summary import record_seconds, show_summary
from common.export.upload import Upload, check_push, push
from common.llama_cpp.build import build_bytes
from common.models.license import Terms, copy_terms, find_terms
from common.models.load import adapter_of, base_of, loaded, runnable, say_llama
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder
from common.option_fields import NEED_IMATRIX
from common.option_sources import options_over
from common.options import Options
from common.report.page import write_own_report
from common.run_fields import BaseRecord, RunRecord
from common.run_lock import held
from common.run_record import Run
from common.system.hardware import choose_backend
from common.training.memory_estimate import TrainingMemory, dims_of
from common.training.metrics import timed
from common.training.resume import check_places, keep_model
from common.verify.cases import cases_of
from common.verify.judge import verdict
from common.verify.verify import verify_held


def fuse_run(run: Path, options: dict[str, Any], context: Context) -> None:
    """`fuse RUN`: the fused folder and the GGUFs again, from the run's adapter. options: those that were given."""
    Run(run).require_complete()
    with held(run):
        try:
            if options.keys() == {"install"} and "gguf" in parts_of(Run(run)):  # made already
                failed = install_made(Run(run), _merged_options(Run(run), Run(run).record, options), context)
                if failed:  # all that was asked for
                    what = f"--install: {Run(run)} was not put into {' and '.join(failed)}; the warning says why."
                    raise UserError(what, f"Then again: python cli.py fuse {Run(run)} --install {' '.join(failed)}")
                return
            merged = _fuse_held(Run(run), options, context)
        finally:
            write_own_report(Run(run), context.display)
    if merged.push:
        push(run, merged.push, Upload(private=not merged.push_public), context.display)


def _fuse_held(run: Run, options: dict[str, Any], context: Context) -> Options:
    display, record = context.display, run.require_complete()
    say_llama(record, context.llama_cpp, display)
    merged = _merged_options(run, record, options)
    if merged.push:
        check_push(merged.push, not merged.push_public, display)
    check_places(run, merged, options, ("model",))
    if merged.model and "model" in options:
        keep_model(run, merged.model, display.say)
    base = base_of(run, display)
    adapter = adapter_of(run, base)
    if "convert" in EXPORT_STEPS[merged.export]:
        _check_inputs(run, base, merged, context.backends)
    memory = TrainingMemory(context.backends(run.plan.backend), dims_of(base), run.recipe, adapter)
    stages = export_stages(merged, base, adapter, memory)
    check_disk(run.path, stages, build_bytes(needs_llama(merged.export), merged.llama_cpp))
    warn_of_memory(stages, display)
    export_run(
        ExportJob(
            run=run,
            base=base,
            adapter=adapter,
            options=merged,
            served=ServingConfig(record.stop_ids, run.read_template(), run.recipe.thinking),
            stages=stages,
            llama=tools_for(merged, adapter.method, base, display),
            seconds={},
            context=context,
        )
    )
    return merged


def _merged_options(run: Run, record: RunRecord, given: dict[str, Any]) -> Options:
    """The run's options with those given now. Raises UserError where these cannot be combined."""
    if given.get("fuse_into") and record.options.get("quantization", "none") == "none":
        raise UserError(
            f"--fuse-into {given['fuse_into']}: {run} had no --quantization: its base comes in one form only.",
            "Leave --fuse-into out.",
        )
    if given.get("export") == "none":
        raise UserError("--export none: fuse would make nothing.", "Leave --export out, or name what to make.")
    asks_for_gguf = _FOR_GGUF & given.keys() or record.options.get("export") == "none"
    if "mlx_bits" in given and "export" not in given:
        given = given | {"export": "mlx"}
    if asks_for_gguf and "export" not in given:
        given = given | {"export": "gguf"}
    # What is verified, weighed and uploaded is asked for each time, not taken from how the run was started.
    fresh: dict[str, Any] = dict.fromkeys(("imatrix", "no_verify", "push_public"), False)
    fresh |= {"imatrix_file": None, "install": [], "push": None}
    if "quant" not in given and "imatrix_file" not in given:  # the run's types, and what some of them cannot be without
        needy = {*record.options["quant"]} & {*NEED_IMATRIX}
        fresh |= {name: record.options.get(name) for name in ("imatrix", "imatrix_file") if needy}
    merged = options_over(record.options | fresh, given, "fuse", _OPTIONS)
    return merged


def _check_inputs(run: Run, base: ModelFolder, options: Options, backends: Backends) -> None:
    """Raises UserError where the data or the backend that the end of a GGUF export needs are missing."""
    if options.imatrix and not kept_matrix(run, options.fuse_into):
        data_of(run, options)
    if not options.no_verify:
        cases_of(run, base.path)
        runnable(run.plan, run.recipe, backends)


def export_run(job: ExportJob) -> None:
    """Make what --export asks for; recorded in run.json.

    Raises UserError where the GGUF is not what was trained, or the MLX folder could not be made; at the end, because
    what was made before is complete.
    """
    run, display, steps = job.run, job.display, EXPORT_STEPS[job.options.export]
    meter, fault = StageMeter(job.stages, job.seconds), None
    if run.record.attest:
        run.update(attest=None)  # it is of files that are made again now
    terms = _record_base(job)
    if "fuse" in steps:
        _write_fused(job, meter)
    if "lora" in steps and job.llama is not None:
        write_lora(job, job.llama, meter)
    if "mlx" in steps:
        try:
            _write_mlx(job, meter)
        except UserError as error:
            fault = error
    with ExitStack() as stack:
        if "convert" in steps and job.llama is not None:
            bf16_gguf = stack.enter_context(run.bf16_gguf())
            write_ggufs(job, job.llama, meter, bf16_gguf)
            with timed(job.seconds, "try"):
                try_gguf(job, job.llama)
        _write_documents(job, terms)
        if "convert" in steps and not _verified(job, meter, bf16_gguf):
            fault = UserError(
                f"{run}: the GGUF does not hold what was trained; the checks above and run.json say where.",
                f"The adapter is complete. Fix what they name, then: python cli.py fuse {run}",
            )
    if steps:
        run.update_export(stages=run.record.export.stages | meter.record())
    record_seconds(run, job.seconds)
    meter.show(display)
    display.event("done", run=str(run.path), stage_seconds=job.seconds)
    if display.mode in ("rich", "plain"):
        show_summary(run.record, job.seconds, display)
        display.say(f"The run is in {run}")
    if fault is not None:
        raise fault
    install_made(run, job.options, job.context)


def install_made(run: Run, options: Options, context: Context) -> list[str]:
    """What --install asks for; what failed of it. Raises UserError where the GGUF is known to be another model."""
    verified = run.record.verify
    if options.install and verified is not None and verified.verdict == "broken":
        raise UserError(f"--install: `verify` calls {run} broken.", f"See why: python cli.py verify {run}")
    return install(run, options.install, context.display)


def _record_base(job: ExportJob) -> Terms:
    """The base's license, on record with the form that its weights came in."""
    folder = job.base.path
    terms = find_terms(folder, job.run.record.model, job.base.model_type)
    job.run.update(base=BaseRecord(terms=asdict(terms), form=base_form(folder, job.options.model or "")))
    return terms


def _write_fused(job: ExportJob, meter: StageMeter) -> None:
    run, out, into = job.run, job.run.fused, job.options.fuse_into
    with (
        meter.stage("fuse", out),
        _replaced(job) as replaced,
        job.display.stage("fuse") as progress,
    ):
        write_fused(job.base, job.adapter, out, job.served, progress, replaced)
    record = run.record
    same = record.export.fuse_into == into  # else the files are of the other weights
    ggufs, matrix = (record.export.gguf, record.export.imatrix) if same else ([], None)
    broken = ggufs and record.verify and record.verify.verdict == "broken"  # they still are; write_ggufs replaces them
    kept = {} if broken else {"verify": None}
    made = {"fused": out.name, "fuse_into": into, "gguf": ggufs, "imatrix": matrix}
    export = record.export.model_copy(update=made)
    run.update(export=export, **kept)


def _write_mlx(job: ExportJob, meter: StageMeter) -> None:
    out = job.run.mlx
    with meter.stage("mlx", out), job.display.stage("mlx") as progress:
        scheme = scheme_of(job.options.mlx_bits, job.base)
        made = write_mlx_model(job.run.fused, out, progress, scheme)
    job.run.update_export(mlx=made)
    size = gigabytes(made["bytes"])
    job.display.say(f"mlx-lm, {scheme} bits, {size}: python -m mlx_lm generate --model {out} --prompt ...")


def _write_documents(job: ExportJob, terms: Terms) -> None:
    """License files beside all weights, and the fused folder's card, without which the folder is complete too."""
    parts = parts_of(job.run)
    for part in {*parts, "gguf", "mlx"}:
        if (job.run.path / part).is_dir():
            copy_terms(job.base.path, job.run.path / part, terms)
    _write_card(job)


def _write_card(job: ExportJob) -> None:
    with job.display.optional("no model card"):
        write_card(job.run)


def _verified(job: ExportJob, meter: StageMeter, bf16_gguf: Path) -> bool:
    """Verify the GGUFs unless the user said no; whether none is known to be broken."""
    if job.options.no_verify:
        return True
    try:
        with meter.stage("verify", bf16_gguf.with_name("none")):
            checks = verify_held(job.run, job.base, job.adapter, job.context, bf16_gguf)
    except Unable as error:
        job.display.warn(f"not verified: {error.what}\nTo verify it later: {PROGRAM} verify {job.run}")
        return True
    _write_card(job)  # again, with the verdict
    return verdict(checks) != "broken"


@contextmanager
def _replaced(job: ExportJob) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Weights in place of the 16-bit base's: none, or with --fuse-into dequantized those that were trained over."""
    run, display, recipe = job.run, job.display, job.run.recipe
    if recipe.quantization == "none":
        yield {}
    elif quantized_source(job.base.path) is not None:
        display.say(
            f"The adapter is fused into the model's dequantized {recipe.quantization} weights: it has no others."
        )
        yield {}
    elif job.options.fuse_into != "dequantized":
        display.say(
            f"The adapter is fused into the 16-bit base, which is better than the {recipe.quantization} one of "
            "training, but not the same; --fuse-into dequantized gives what training saw."
        )
        yield {}
    else:
        display.say(f"The adapter is fused into the dequantized {recipe.quantization} weights that it was trained on.")
        plan = run.plan
        if (plan.backend == "mlx") != recipe.quantization.startswith("mlx"):
            raise UserError(
                f"{run}: plan.yaml says {plan.backend}, its base is {recipe.quantization}.",
                "Restore plan.yaml.",
            )
        backends = job.context.backends
        choose_backend(plan.backend, backends)  # a run may have come from another machine
        device = backends(plan.backend).choose_device("auto").value
        backend, _ = loaded(job.context, recipe, plan.on(device), job.base.path, job.adapter)
        try:
            yield backend.dequantized()
        finally:
            backend.close()


_FOR_GGUF = {"quant", "imatrix", "imatrix_file", "split_size", "no_verify", "install"}
_OPTIONS = (
    *("llama_cpp", "export", "quant", "imatrix", "imatrix_file", "split_size", "mlx_bits", "fuse_into", "no_verify"),
    *("install", "push", "push_public", "model"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s RUN [--option VALUE ...]"
    parser.epilog = "What is not given is as the run was started; a run that exported nothing makes a GGUF."
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    add_options(parser, _OPTIONS, dict.fromkeys(_OPTIONS), refused=("none",))


def run(args: argparse.Namespace, context: Context) -> None:
    llama_cpp = args.flags.get("llama_cpp", context.llama_cpp)
    fuse_run(args.run, args.flags, replace(context, llama_cpp=llama_cpp))

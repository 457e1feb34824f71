"""The main job in its order: check everything, train, fuse, export, verify."""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.backend import Adapter, Backend, Memory
from common.commands.arguments import add_options, read_options
from common.commands.experts import ExpertWatch
from common.commands.fuse import export_run
from common.commands.header import show_header
from common.commands.new_run import begin, claimed, write_template
from common.commands.prepare import Job, prepare
from common.commands.several import first_rank, other_rank, start, workers
from common.commands.tuned import sample, score_test
from common.commands.watch import Collapsed, watching
from common.context import Context
from common.display import Display
from common.errors import PROGRAM, AtOdds, UserError, os_fault
from common.export.job import ExportJob
from common.export.summary import record_seconds
from common.export.upload import Upload, push
from common.models import adapter_files as adapters
from common.models.families import is_multimodal
from common.models.load import loaded, say_llama
from common.models.lora_init import validate
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.options import Options
from common.report.kept import keep_shown
from common.report.live import live_page, reported
from common.report.tracking import Tracking, tracked
from common.run_fields import ExportRecord
from common.run_lock import held
from common.run_record import Run
from common.system.disk import once_there_is_room
from common.system.launch import launched
from common.system.memory import peak_rss, reset_peak_rss, swap_used
from common.system.signals import stop_signals
from common.training.checkpoint import Checkpoint, State, latest_step, outlasting
from common.training.faults import unsaved
from common.training.forecast import Forecast
from common.training.learned_memory import keep
from common.training.loop import Interrupted, TrainingLoop
from common.training.metrics import figures, timed
from common.training.resume import (
    as_begun,
    asked,
    change_length,
    options_to_resume,
    parent_of,
    resume_command,
    resume_run,
    resumed_options,
    say_asked,
)
from common.training.rollback import RolledBack, roll_back
from common.training.shared_backend import SharedBackend
from common.training.short_memory import SWAP_GROWTH
from common.training.validation import worse_than_start
from common.verify.cases import write_cases

# What the record says of the adapter that is exported, before anything is known.
_OF_ADAPTER: dict[str, Any] = {
    **{"verify": None, "experts": None, "export": ExportRecord()},
    **dict.fromkeys(("test_loss", "test_perplexity", "test_rows", "test_hash")),
    **{"test_loss_interval": [], "test_perplexity_interval": []},
}


def run_training(options: Options, context: Context) -> Path:
    """`train`: check, train, export. Returns the run folder. Raises UserError, or Interrupted after a saved stop."""
    with live_page(context.display) as show:
        while True:
            try:
                return _run_training(options, context, show)
            except RolledBack as back:
                options = options_to_resume(options, back.run)


def _run_training(options: Options, context: Context, show: Callable[[Run, Options], None]) -> Path:
    """The same, from the start or a checkpoint on. show: serves the run's page, with --live. Raises RolledBack too."""
    seconds: dict[str, float] = {}
    display = context.display
    with ExitStack() as lock:
        resumed, given, parent = Run(Path(options.resume)) if options.resume else None, options, None
        if resumed:
            record = resumed.record
            lock.enter_context(held(resumed.path))
            say_llama(record, context.llama_cpp, display)
            options = resumed_options(given, resumed)
            say_asked(record, given, display.say)
            parent = parent_of(given, options, resumed)
        with timed(seconds, "prepare"):
            job = prepare(options, resumed, context, seconds, parent)
        seconds["prepare"] -= seconds["tokenize"]
        if resumed:
            job = replace(job, recipe=as_begun(resumed, job.recipe))
            if given.steps or given.epochs:
                display.say(change_length(resumed, job.recipe, options))
            found = resume_run(resumed, job.recipe, job.plan, display.warn, options.finish, given)
            keep_shown(resumed, options)
            write_template(job)
            if not resumed.verify_cases.exists():  # an older version's run
                write_cases(resumed.verify_cases, job.cases)
        else:
            job, found = claimed(job, lock), None
            begin(job)
        tracking = lock.enter_context(tracked(job.run, options, found.state.step if found else 0, display))
        lock.enter_context(reported(job.run, options.lang, display))
        show(job.run, options)
        try:
            experts = ExpertWatch(job, display, seconds)
            backend, adapter = _train(job, found, tracking, context, experts)
            validate(adapter, linear_shapes(job.base.model, job.recipe.targets), job.run.path)
            layers = job.base.model.config["num_hidden_layers"]  # an older version's checkpoint may have counted fewer
            multimodal = is_multimodal(job.base.model.written_config)
            of_layers = replace(adapter, layers=layers)
            adapter = once_there_is_room(
                lambda: adapters.write_both(job.run.path, of_layers, multimodal), "The adapter", display.warn
            )
            experts.tell_of_peft(adapter)
            job.run.update(status="complete", finished_step=job.run.record.steps if options.finish else None)
        except BaseException as error:
            with display.optional("run.json is not up to date"):
                job.run.update(status="interrupted")
                record_seconds(job.run, seconds)
            if isinstance(error, OSError):
                raise unsaved(job.run.path, error) from None
            if isinstance(error, AtOdds) or not isinstance(error, (Interrupted, UserError)):
                display.warn(f"training was stopped. To continue: {resume_command(job.run, given)}")
            raise
        _after_training(job, backend, adapter, context, experts)
    if job.left_out:
        display.warn(job.left_out)
    if job.options.push:
        push(job.run.path, job.options.push, Upload(private=not job.options.push_public), display)
    return job.run.path


def _train(
    job: Job, found: Checkpoint | None, tracking: Tracking, context: Context, experts: ExpertWatch
) -> tuple[Backend, Adapter]:
    """The loop with its backend loaded around it. Returns the backend, still loaded, and the adapter to export."""
    recipe, display, seconds, swap = job.recipe, context.display, experts.seconds, swap_used()
    estimate = job.chosen.prediction
    job.run.update(predicted_peak_bytes=estimate.peak, predicted_parts=estimate.parts)
    reset_peak_rss()
    if found:
        found.require_fit(job.start)
    state = found.state if found else State.before_training(job.plan)
    options = job.options
    chosen = options.micro_batch_tokens is None and options.gradient_checkpointing is None and not recipe.dropout
    forecast = Forecast(None if found or job.plan.sharded else job.memory, replans=chosen)
    with timed(seconds, "load"), display.stage("load the model"):
        backend, info = loaded(context, recipe, job.plan, job.base.training_base, job.start)
    experts.begin(backend)
    if found:
        with timed(seconds, "load"):
            backend.set_adapter(found.adapter)
            backend.set_optimizer(found.optimizer)
    del found  # as large as what is trained, three times
    show_header(job, info, display)
    with stop_signals(display.stopping) as received, display.training(recipe.steps, state.step):
        try:
            with watching(job, backend, state, display, received, tracking) as observer, observer.rolling_back(state):
                rest = state, observer, seconds, forecast, options.finish
                TrainingLoop(backend, recipe, job.plan, job.train, job.valid, job.run.path, *rest).train()
        except BaseException as error:
            with display.optional("run.json lacks the figures of this process"):
                _record(job, state, backend, swap_used() - swap)
            if isinstance(error, RolledBack):
                display.warn(roll_back(job.run, recipe, job.plan, state, error.since))
                backend.close()
                if received:
                    raise Interrupted(job.run) from None
            raise
        memory = _record(job, state, backend, swap_used() - swap)
        with display.optional("later estimates of memory do not learn from this run"):
            learns = memory.kind != "sampled" and swap_used() - swap < SWAP_GROWTH
            if (seen := forecast.observation(memory.peak)) and learns:
                keep(seen)
    if received:  # after the last step: the export is left for later too
        raise Interrupted(job.run)
    if worse_than_start(state):
        display.warn(
            f"no validation was better than before the first step ({state.start_valid_loss:.4f}; the best was "
            f"{state.best_valid_loss:.4f}): lower --learning-rate, or look at the rows with check-data"
        )
    _note_exported(job, state, display)
    return backend, state.best or outlasting(job.run.path, state.step, backend.get_adapter())


def _note_exported(job: Job, state: State, display: Display) -> None:
    """Put on record which adapter is the run's. What was made of another is no longer, wherever this process ends."""
    exported, before = "best" if state.best is not None else "last", job.run.record
    step = state.best_step if state.best is not None else state.step
    stale = _OF_ADAPTER if before.exported_step != step else {}
    if stale and (old := [str(job.run.path / made.file) for made in before.export.gguf]):
        display.warn(
            f"{', '.join(old)}: of the adapter of step {before.exported_step}, and so until made again by this "
            f"command or by {PROGRAM} fuse {job.run}"
        )
    job.run.update(exported_adapter=exported, exported_step=step, **stale)
    display.say(f"The adapter of step {step} ({exported}) is the one that is kept")


def _record(job: Job, state: State, backend: Backend, swap_growth: int) -> Memory:
    """Put on record what training determines; the peaks of a resumed run are of all its processes on one backend.

    Returns the memory that was read, this process's.
    """
    before, memory = job.run.record, backend.memory()
    same_kind = before.memory_kind in (None, memory.kind)  # of another backend, peak and estimate are others
    job.run.update(
        **figures(state, job.recipe, job.plan),
        saved_recipe=job.recipe.hash() if latest_step(job.run.path) else "",
        shares=backend.shares() if isinstance(backend, SharedBackend) else [],
        memory_kind=memory.kind,
        peak_memory_bytes=max(memory.peak, (same_kind and before.peak_memory_bytes) or 0),
        peak_rss_bytes=max(peak_rss(), before.peak_rss_bytes or 0),
        swap_growth_bytes=max(swap_growth, before.swap_growth_bytes or 0),
    )
    return memory


def _after_training(job: Job, backend: Backend, adapter: Adapter, context: Context, experts: ExpertWatch) -> None:
    """Score and export the adapter. Where that fails, the command that does it later is said."""
    try:
        experts.end(backend, adapter)
        score_test(job, backend, adapter, experts.seconds, context.display)
        _export(job, backend, adapter, experts.seconds, context)
    except BaseException as error:
        unscored = job.test and job.run.record.test_loss is None  # which `fuse` would not do
        pushed = asked(job.options.model_dump(), ("push", "push_public"))
        again = resume_command(job.run, job.options) if unscored else f"{PROGRAM} fuse {job.run}{pushed}"
        context.display.warn(f"training is complete and kept. To export it: {again}")
        if isinstance(error, OSError):
            raise os_fault(error, f"export again: {again}") from None
        raise


def _export(job: Job, backend: Backend, adapter: Adapter, seconds: dict[str, float], context: Context) -> None:
    if job.options.export != "gguf" and job.prompts:  # no GGUF will be there to be asked
        with timed(seconds, "try"):
            sample(job, backend, adapter, context.display)
    backend.close()
    if job.options.export != "none":
        with context.display.stage("look whether the model is the same") as progress:
            same = ModelFolder(job.base.model.path).content_hash(progress) == job.recipe.model_hash
        if not same:
            raise UserError(f"{job.base.model.path} has changed since training began.", "Restore that model.")
    export_run(
        ExportJob(
            run=job.run,
            base=job.base.model,
            adapter=adapter,
            options=job.options,
            served=job.served,
            stages=job.stages,
            llama=job.llama,
            seconds=seconds,
            context=context.after_training(),
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--option VALUE ...]"
    parser.epilog = "Most options work in a YAML file too, as in configs/quickstart.yaml; see docs/options.md."
    add_options(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    launch = launched()
    if launch and launch.rank:
        return other_rank(args, context, launch)
    options, context = read_options(args, context)
    if launch is None and options.devices not in (None, "1"):
        return start(options, context)
    try:
        with ExitStack() as stack:
            if launch:
                options, context = stack.enter_context(first_rank(options, context, launch))
            elif options.workers:
                context = stack.enter_context(workers(options, context))
            run_training(options, context)
    except Collapsed as stop:
        raise UserError(*stop.args) from None
    except Interrupted as stop:
        command = resume_command(stop, options)
        if options.resume and "on_collapse" in options.model_fields_set:  # not on the run's record
            command += f" --on-collapse {options.on_collapse}"
        context.display.warn(f"stopped after a finished step, saved. Continue with: {command}")
        return 130
    return 0

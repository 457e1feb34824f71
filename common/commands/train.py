"""The main job in its order: check everything, train, fuse, export, measure."""

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import run_record
from common.backend import Adapter, Backend, Memory, ModelInfo
from common.commands.arguments import add_options, read_options
from common.commands.fuse import finish, record_seconds
from common.commands.prepare import Job, check_unused, free_name, prepare
from common.context import Context
from common.data.batching import steps_per_epoch
from common.display import Display, gigabytes
from common.errors import PROGRAM, UserError
from common.export.gguf import SAMPLE_TOKENS
from common.export.job import ExportJob
from common.export.upload import push
from common.inference.backend_chat import backend_chat_model
from common.models import adapter_files as adapters
from common.models.load import TEMPLATE, loaded, say_llama
from common.models.lora_init import validate
from common.models.shapes import linear_shapes
from common.options import Options, write_yaml
from common.recipe import Plan, Recipe
from common.run_record import held
from common.sampling import Sampling
from common.system.environment import write_environment
from common.system.memory import ResidentSet, swap_used
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted, TrainingLoop
from common.training.metrics import deterministic, figures, timed
from common.training.planner import described

_PLAN = "what changes only speed and memory"


def run_training(options: Options, context: Context) -> Path:
    """The whole of `train`. Raises UserError, or Interrupted after a saved stop. Returns the run folder."""
    seconds: dict[str, float] = {}
    display = context.display
    with ExitStack() as lock:
        resumed = Path(options.resume) if options.resume else None
        if resumed:
            known = run_record.read_run(resumed, "options", "recipe_hash")
            lock.enter_context(held(resumed))
            say_llama(known, context.llama_cpp, display)
            options = _resumed_options(options, resumed)
        with timed(seconds, "prepare"):
            job = prepare(options, resumed, context, seconds)
        seconds["prepare"] -= seconds["tokenize"]
        if resumed:
            state = _go_on(job)
        else:
            job = _claimed(job, lock)
            state = _begin(job)
        try:
            backend, final = _train(job, state, context, seconds)
        except BaseException as error:
            run_record.update_run(job.run, status="interrupted")
            record_seconds(job.run, seconds)
            if not isinstance(error, (Interrupted, UserError)):
                display.warn(f"training was stopped. To go on: {PROGRAM} train --resume {job.run}")
            raise
        validate(final, linear_shapes(job.folder, job.recipe.targets), job.run)
        adapters.write_both(job.run, final)
        run_record.update_run(job.run, status="complete")
        export = ExportJob(job.run, job.folder, final, job.options, job.served, job.llama, seconds, context)
        try:
            if job.options.export != "gguf" and job.sample:
                with timed(seconds, "try"):
                    _sample(job, backend, export)
            backend.close()
            finish(export)
        except BaseException:
            display.warn(f"training is complete and kept. To export it: {PROGRAM} fuse {job.run}")
            raise
    if job.options.push:
        push(job.run, job.options.push, None, not job.options.push_public, False, display)
    return job.run


def _train(job: Job, state: State, context: Context, seconds: dict[str, float]) -> tuple[Backend, Adapter]:
    """The loop with its backend loaded around it. Returns the backend, still loaded, and the adapter to export."""
    recipe, display, resident, swap = job.recipe, context.display, ResidentSet(), swap_used()
    found = checkpoint.latest(job.run, recipe.hash()) if state.step else None
    with timed(seconds, "load"), display.stage("load the model"):
        backend, info = loaded(context, recipe, job.plan, job.training_base, job.start)
        if found:
            backend.set_adapter(found[1])
            backend.set_optimizer(found[2])
    _header(job, info, display)
    with _stop_signals(display.stopping) as heard, display.training(recipe.steps, state.step):
        watch = _Watch(display, heard)
        try:
            TrainingLoop(backend, recipe, job.plan, job.train, job.valid, job.run, state, watch, seconds).train()
        finally:
            memory, before = (
                backend.memory(),
                run_record.read_run(job.run),
            )  # a resumed run's peaks are of all its processes
            run_record.update_run(
                job.run,
                **figures(state, recipe, job.plan),
                predicted_peak_bytes=job.chosen.prediction.peak,
                predicted_parts=job.chosen.prediction.parts,
                memory_kind=memory.kind,
                peak_memory_bytes=max(memory.peak, before.get("peak_memory_bytes", 0)),
                peak_rss_bytes=max(resident.process_peak(), before.get("peak_rss_bytes", 0)),
                swap_growth_bytes=max(swap_used() - swap, before.get("swap_growth_bytes", 0)),
            )
    if heard:  # after the last step: the export is left for later too
        raise Interrupted(job.run)
    exported = "best" if state.best is not None else "last"
    step = state.best_step if state.best is not None else state.step
    run_record.update_run(job.run, exported_adapter=exported, exported_step=step)
    display.say(f"The adapter of step {step} ({exported}) is the one that is exported")
    return backend, state.best or backend.get_adapter()


def _sample(job: Job, backend: Backend, export: ExportJob) -> None:
    """What the tuned model says: no GGUF will be there to be asked. A failure here costs nobody a training."""
    served, think, context = job.served, job.recipe.thinking == "keep", job.sample_tokens + SAMPLE_TOKENS
    with export.display.optional("no sample"):
        backend.set_adapter(export.final)
        model = backend_chat_model(backend, job.folder.path, served.template, served.stops, think, "", True, context)
        pieces = model.answer(job.sample, Sampling(temperature=0, max_tokens=SAMPLE_TOKENS), ())
        answer = "".join(text for text, _ in pieces)
        export.keep(sample={"prompt": job.sample, "answer": answer})
        export.display.sample(job.plan.backend, str(job.sample[-1]["content"]), answer)


class _Watch:
    """The loop's Observer: the display, and whether a stop was asked for. heard: the signals that asked."""

    def __init__(self, display: Display, heard: list[int]) -> None:
        self._display, self._heard = display, heard

    def step(self, line: dict, memory: Memory) -> None:
        self._display.step(line, memory)

    def evaluation(self, line: dict) -> None:
        self._display.evaluation(line)

    def warn(self, text: str) -> None:
        self._display.warn(text)

    def stop_requested(self) -> bool:
        return bool(self._heard)


@contextmanager
def _stop_signals(tell: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a terminal that hangs up are noted, so that the step ends and is saved; yields those heard.

    `tell` is called at the first. A second Ctrl-C acts at once; a system that sends SIGHUP and then SIGTERM means one
    stop. Under nohup, which ignores SIGHUP, it stays ignored.
    """
    heard: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in heard:
            raise KeyboardInterrupt
        heard.append(number)
        if len(heard) == 1:
            tell()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield heard
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _header(job: Job, info: ModelInfo, display: Display) -> None:
    recipe, plan = job.recipe, job.plan
    hardware = job.hardware
    epochs = recipe.steps / steps_per_epoch(len(job.train), recipe.batch_size)
    display.panel(
        "Twintune",
        {
            "model": f"{recipe.model} ({info.architecture}, {info.layers} layers)",
            "backend": f"{plan.backend}: {hardware.backend.why}",
            "device": f"{plan.device}: {hardware.device.why}",
            "precision": f"{recipe.precision}: {hardware.precision.why}",
            "data": f"{recipe.data}: {len(job.train)} train, {len(job.valid)} valid rows",
            "recipe": f"{recipe.hash()[:12]}: {recipe.steps} steps of {recipe.batch_size} rows ({epochs:.2f} epochs), "
            f"learning rate {recipe.learning_rate:g} {recipe.schedule}, {recipe.warmup_steps} warm-up steps",
            "method": f"{_method(recipe, job.start)}: "
            f"{info.trainable:,} of {info.total:,} parameters are trained ({info.trainable / info.total:.2%})",
            "plan": described(plan),
            "memory": f"about {gigabytes(job.chosen.prediction.peak)} will be taken of {gigabytes(plan.memory_budget)} "
            f"({job.chosen.why})" + ("" if job.chosen.prediction.measured else "; on this device not yet measured"),
            "run": str(job.run),
        },
    )


def _method(recipe: Recipe, start: Adapter | None) -> str:
    if start is None:
        return "full fine-tuning"
    ranks = sorted({weight.rank for weight in start.weights.values()})
    alphas = sorted({weight.alpha for weight in start.weights.values()})
    return (
        f"{'DoRA' if recipe.method == 'dora' else 'LoRA'}, rank {', '.join(map(str, ranks))}, "
        f"alpha {', '.join(f'{a:g}' for a in alphas)}{' / sqrt(rank)' if recipe.rslora else ''} on "
        f"{len(start.weights)} layers"
        + (f" of a {recipe.quantization} base" if recipe.quantization != "none" else "")
        + (", going on from a given adapter" if recipe.adapter_hash else "")
    )


def _go_on(job: Job) -> State:
    """Where a resumed run stands; its record is brought up to date. Raises UserError for another recipe."""
    known, run = run_record.read_run(job.run), job.run
    if known["recipe_hash"] != job.recipe.hash():
        old, new = run_record.read_recipe(run).model_dump(), job.recipe.model_dump()
        changed = ", ".join(name for name in new if new[name] != old[name] and name not in ("model", "data"))
        raise UserError(
            f"{run}: it is another recipe than when it began (changed: {changed or 'its recipe.yaml'}).",
            "Bring the old files back, or start a new run.",
        )
    found = checkpoint.latest(run, job.recipe.hash())
    state, plans = found[0] if found else _fresh(job.plan), known.get("plans", [])
    if _lasting(job.plan) != _lasting(run_record.read_plan(run)):
        state.micro_batch_tokens = job.plan.micro_batch_tokens
        state.gradient_checkpointing = job.plan.gradient_checkpointing
        write_yaml(run / "plan.yaml", job.plan, _PLAN)
        plans.append({"from_step": state.step + 1} | job.plan.model_dump())
    run_record.update_run(run, status="training", plans=plans)
    return state


def _claimed(job: Job, lock: ExitStack) -> Job:
    """The job with its run folder made and held, before anything is written there: another process may want the same.

    Raises UserError where that one was quicker and the folder was named by hand; else another name is taken.
    """
    while True:
        try:
            job.run.mkdir(parents=True, exist_ok=bool(job.options.output))
            break
        except FileExistsError:
            job = replace(job, run=free_name(job.run))
    lock.enter_context(held(job.run))
    check_unused(job.run)
    return job


def _begin(job: Job) -> State:
    """A new run's files, in its folder that is held."""
    write_yaml(job.run / "recipe.yaml", job.recipe, f"recipe {job.recipe.hash()}")
    write_yaml(job.run / "plan.yaml", job.plan, _PLAN)
    if job.served.template is not None:
        (job.run / TEMPLATE).write_text(job.served.template, encoding="utf-8")
    write_environment(job.run)
    run_record.update_run(
        job.run,
        status="training",
        recipe_hash=job.recipe.hash(),
        model_hash=job.recipe.model_hash,
        plans=[{"from_step": 1} | job.plan.model_dump()],
        deterministic=deterministic(job.recipe, job.plan, job.config),
        stop_ids=job.served.stops,
        sample_prompt=job.sample,
        sample_tokens=job.sample_tokens,
        data={
            "train_rows": len(job.train),
            "valid_rows": len(job.valid),
            "tokens": sum(len(row.ids) for row in job.train),
            "label_tokens": sum(row.label_tokens for row in job.train),
        },
        options=_anchored(job.options.model_dump(by_alias=True, exclude={"resume", "config"})),
    )
    return _fresh(job.plan)


def _lasting(plan: Plan) -> Plan:
    """Without what the machine happened to have free."""
    return plan.model_copy(update={"memory_budget": 0})


def _fresh(plan: Plan) -> State:
    return State(micro_batch_tokens=plan.micro_batch_tokens, gradient_checkpointing=plan.gradient_checkpointing)


def _anchored(options: dict[str, Any]) -> dict[str, Any]:
    """Paths made absolute, so that the run can be resumed from another working folder."""
    for key in ("model", "data", "llama_cpp", "adapter", "chat_template"):
        if options[key] and Path(options[key]).expanduser().exists():
            options[key] = str(Path(options[key]).expanduser().resolve())
    return options


def _resumed_options(options: Options, run: Path) -> Options:
    known = run_record.read_run(run, "options", "recipe_hash")
    plan, recipe = run_record.read_plan(run), run_record.read_recipe(run)
    given = options.model_dump(by_alias=True, exclude_unset=True)
    # what was `auto` then stays what it became, unless the run moves
    kept = {name: value for name, value in plan.model_dump().items() if name in Options.model_fields}
    kept["precision"] = recipe.precision
    if "memory_limit" in given:  # a new plan
        kept |= {"micro_batch_tokens": None, "gradient_checkpointing": None}
    if given.get("backend", plan.backend) != plan.backend:
        if recipe.quantization != "none":
            raise UserError(
                f"--backend {given['backend']}: {run} has a base quantized by {plan.backend} ({recipe.quantization}), "
                "which another backend cannot compute.",
                "Go on with the backend it was started with.",
            )
        kept |= {"device": "auto", "micro_batch_tokens": None, "gradient_checkpointing": None}
    return Options.model_validate(known["options"] | kept | given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--option VALUE ...]"
    parser.epilog = "Every option may stand in a YAML file as well (--config), as in configs/quickstart.yaml."
    add_options(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    options, context = read_options(args, context)
    try:
        run_training(options, context)
    except Interrupted as stop:
        command = f"{PROGRAM} train --resume {stop}"
        context.display.warn(f"stopped after a finished step, saved. Go on with: {command}")
        return 130
    return 0

"""`plan`: the memory and time that `train` would take, estimated before anything is trained."""

import argparse
import time
from functools import cache

from common.backend import OutOfMemory
from common.commands.arguments import add_options, heading_of, read_options
from common.commands.prepare import Job, prepare
from common.commands.several import counted
from common.context import Context
from common.data.batching import micro_batches, step_rows
from common.display import gigabytes
from common.errors import UserError
from common.models.load import loaded
from common.options import Options
from common.training.learned_memory import forget, summary
from common.training.planner import Work, described, largest, prediction

_LONGEST = 2**17  # tokens of a row, of a model that has no position embeddings


def estimate_run(options: Options, probe: bool, context: Context) -> None:
    """Print the estimated memory and its parts, the plan, what would fit at most and, after a probe, the time."""
    display = context.display
    job = prepare(options.model_copy(update={"export": "none", "push": None}), None, context)
    chosen, recipe, plan = job.chosen, job.recipe, job.plan
    rows = [[name, gigabytes(size)] for name, size in chosen.prediction.parts.items()]
    rows.append(["estimated peak", gigabytes(chosen.prediction.peak)])
    rows.append(["budget", f"{gigabytes(chosen.budget)} ({chosen.why})"])
    known = "" if chosen.prediction.measured else f", {plan.backend} on {plan.device}: coefficients not yet measured"
    display.table(f"Memory of {recipe.model}{known}", ["part", "size"], rows)
    if job.memory.learned.observations:
        display.say(f"{job.memory.learned}; plan --forget removes it")
    display.say(f"plan: {plan.backend} on {plan.device_name}, {recipe.precision}, {described(plan)}")
    longest = int(job.train.lengths.max()) - 1
    batch, length = largest(
        job.memory, plan, longest, job.config.get("max_position_embeddings") or _LONGEST, chosen.budget
    )
    display.say(
        f"at most, with gradient checkpointing: {batch} rows of the longest length ({longest} tokens) in one "
        f"micro-batch, or one row of {length} tokens. --batch-size may be larger: a step is split into micro-batches"
    )
    event = {
        "parts": chosen.prediction.parts,
        "predicted_peak_bytes": chosen.prediction.peak,
        "plan": plan.model_dump(),
    }
    if plan.ranks > 1:
        display.say(f"all of this is of each of {plan.ranks} devices; their speed together is not measured")
    elif probe:
        event |= _probe(job, context)
    display.event("plan", **event, largest_micro_batch_rows=batch, largest_row_tokens=length)


def _probe(job: Job, context: Context) -> dict[str, float]:
    """Measure a step on the real rows, repeated: the first warm up, the last counts. Nothing is kept.

    A GPU compiles or records in the first two what it then repeats.
    """
    recipe, plan, display = job.recipe, job.plan, context.display
    count, many = (2, "two") if plan.device == "cpu" else (3, "three")
    work = Work.of(job.train, recipe, job.valid)
    expected = cache(lambda: work.expected(recipe.steps, plan, plan.micro_batch_tokens))
    started = time.perf_counter()
    with display.stage("load the model"):
        backend, _ = loaded(context, recipe, plan, job.base.training_base, job.start)
    seconds = time.perf_counter() - started
    chosen = [job.train[i] for i in step_rows(len(job.train), recipe.batch_size, recipe.seed, 1)]
    batches = micro_batches(chosen, plan.micro_batch_tokens, plan.device)
    try:
        backend.expect(expected)
        with display.stage(f"{many} steps to measure") as progress:
            for step in range(1, count + 1):
                started = time.perf_counter()
                float(backend.train_step(batches, recipe.learning_rate, step).loss_sum)
                second = time.perf_counter() - started
                progress(step / count, f"step {step}")
        peak = backend.memory().peak
    except OutOfMemory as error:
        display.warn(f"the {many} steps ran out of memory ({error}): train would continue with smaller micro-batches")
        return {}
    finally:
        backend.close()
    epoch = int((job.train.lengths - 1).sum())
    trained = epoch * recipe.steps * recipe.batch_size / len(job.train)
    evaluations = recipe.steps / recipe.eval_every * int((job.valid.lengths - 1).sum()) / 3
    speed = sum(batch.tokens for batch in batches) / second
    estimated = seconds + (trained + evaluations) / speed
    memory = job.memory.expecting(plan, expected)
    seen = memory.observed(plan, {batch.shape for batch in batches}, None, max(1, peak))
    corrected = prediction(job.memory.corrected(seen), plan, work).peak
    display.say(
        f"measured: {speed:.0f} tokens/s, peak {gigabytes(peak)} in {many} steps, by which training takes "
        f"{gigabytes(corrected)}; {recipe.steps} steps would take about {_duration(estimated)}, export not counted"
    )
    measured = {"tokens_per_second": speed, "expected_seconds": estimated, "probe_peak_bytes": peak}
    return measured | {"corrected_peak_bytes": corrected}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [MODEL] [--no-probe] [--forget] [--option VALUE ...]"
    parser.epilog = f"Example: {parser.prog} google/gemma-3-1b-it --data rows.jsonl --rank 32 --memory-limit 8GB"
    parser.add_argument("named", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    parser.add_argument(
        "--no-probe", action="store_true", help="only compute; else a few steps are taken to measure the speed"
    )
    parser.add_argument(
        "--forget",
        action="store_true",
        help="first remove what earlier runs have taught the estimate of memory; without other options, do only that",
    )
    add_options(parser)


def run(args: argparse.Namespace, context: Context) -> None:
    if args.named is not None:
        if "model" in args.flags:
            raise UserError(f"The model is given twice: {args.named} and --model.", "Give it once.")
        args.flags["model"] = args.named
    if "resume" in args.flags:
        raise UserError("--resume: plan estimates a new training.", "Give the model and the data instead.")
    options, context = read_options(args, context)
    if args.forget:
        context.display.say(f"forgotten: {summary(forget()) or 'nothing had been learned'}")
        if not args.flags:
            return
    if idle := [f"--{name.replace('_', '-')}" for name in args.flags if heading_of(name) == "Export"]:
        context.display.say(f"plan estimates the training alone: {', '.join(idle)} is for what train does after it")
    estimate_run(counted(options, context), not args.no_probe, context)

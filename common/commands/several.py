"""A training on several devices: start the launcher, or be one of the processes that it has started."""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from common.backend_package import BackendPackage, Backends, RankPackage
from common.context import Context
from common.display import Display
from common.errors import RankLost, UserError
from common.models.training_base import find_base
from common.option_sources import absolute_paths, load_options
from common.options import Options
from common.recipe import Recipe
from common.run_record import Run
from common.system.hardware import choose_backend
from common.system.launch import Launch, free_cores
from common.system.signals import STOPS
from common.training.ranked_backend import RankedPackage, follow
from common.training.ranks import Ranks
from common.training.resume import options_to_resume, resume_command
from common.training.shared_backend import SharedPackage
from common.training.transport import Line, secret


def start(options: Options, context: Context) -> int:
    """Give this command to --devices processes of this machine; the exit status."""
    package, device = _on(options, context)
    count, here = int(counted(options, context).devices or 1), package.device_count(device)
    if device != "cpu" and count > here:
        raise UserError(
            f"--devices {options.devices}: {here} {'GPU is' if here == 1 else 'GPUs are'} here.",
            "Give a smaller number, or all. Several machines: see docs/scale.md.",
        )
    began = time.time()
    try:
        return package.launch(count, sys.argv)
    except RankLost:  # rank 0, which would have said so itself
        newest = max((run for run in _runs(options) if _is_of(run, options)), key=_changed, default=None)
        if newest and _changed(newest) >= began:
            context.display.warn(f"training was stopped. To continue: {resume_command(newest, options)}")
        raise


def _runs(options: Options) -> list[Run]:
    """Where the run of these options may be."""
    given = options.resume or options.output
    return [Run(folder) for folder in ([Path(given)] if given else Path("runs").glob("*"))]


def _changed(run: Run) -> float:
    return run.record_file.stat().st_mtime


def counted(options: Options, context: Context) -> Options:
    """The options with --devices as a number."""
    if options.devices != "all":
        return options
    package, device = _on(options, context)
    return options.model_copy(update={"devices": str(package.device_count(device))})


def _on(options: Options, context: Context) -> tuple[RankPackage, str]:
    """The package of the backend that would train, and the device."""
    kept = Run(Path(options.resume)).plan.backend if options.resume else "auto"
    name = choose_backend(kept if options.backend == "auto" else options.backend, context.backends).value
    package = _package(name, context)
    return package, package.choose_device(options.device).value


def restarted(options: Options, launch: Launch) -> Options:
    """Where torchrun has started all ranks again: the options that continue the run that they had begun."""
    if not launch.restarts:
        return options
    if options.resume:
        run = Run(Path(options.resume))
        before = run.record.options
        as_long = (before.get("steps"), before.get("epochs")) == (options.steps, options.epochs)
        return options_to_resume(options, run) if as_long else options
    begun = [run for run in _runs(options) if _is_of(run, options) and run.record.launch == launch.name]
    newest = max(begun, key=_changed, default=None)
    return options_to_resume(options, newest) if newest else options


def _is_of(run: Run, options: Options) -> bool:
    """Whether the run has the model and the data of these options; a resume names it and gives neither."""
    given = absolute_paths(options.model_dump(by_alias=True, include={"model", "data"}))
    try:
        known = run.record.options if run.record_file.exists() else None
    except UserError:
        return False
    return known is not None and (bool(options.resume) or given.items() <= known.items())


@contextmanager
def first_rank(options: Options, context: Context, launch: Launch) -> Iterator[tuple[Options, Context]]:
    """The options and the context with which rank 0 trains on all ranks; these end when it does."""
    package, ranks = _join(options, context, launch)
    ranked = RankedPackage(package, ranks)
    backends = context.backends
    given = {"backend": launch.by, "device": ranks.members[0].device, "devices": str(ranks.group.size)}
    if options.workers:
        raise UserError("--with: a launcher has started several ranks.", "Use one of them.")
    ended = False

    def end() -> Backends:
        nonlocal ended
        if not ended and not ranks.within:  # or nothing more can be told; the others see that this rank ends
            with suppress(RankLost):
                ranks.tell("end")
            ranks.group.close()
        ended = True
        free_cores()
        return backends

    try:
        yield (
            restarted(options, launch).model_copy(update=given),
            replace(context, backends=lambda name: ranked if name == launch.by else backends(name), end_training=end),
        )
    except RankLost:
        ended = True
        raise
    finally:
        end()


def other_rank(args: argparse.Namespace, context: Context, launch: Launch) -> int:
    """Do what rank 0 asks for, which stops where that is asked for, and alone says what is wrong."""
    try:
        options, _ = load_options(args.flags, args.command)
    except UserError:  # rank 0 has it too
        return 1
    try:
        package, ranks = _join(options, context, launch)
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        follow(package.create, ranks, lambda recipe: base_folder(options.model, recipe, launch.by))
    except RankLost:  # rank 0 says which
        return 1
    except UserError as error:
        raise UserError(f"rank {launch.rank}: {error.what}", error.fix) from None
    ranks.group.close()
    return 0


def _join(options: Options, context: Context, launch: Launch) -> tuple[RankPackage, Ranks]:
    if options.backend not in ("auto", launch.by):
        launcher = {"torch": "torchrun", "mlx": "mlx.launch"}[launch.by]
        raise UserError(f"--backend {options.backend}: {launcher} has started this.", f"Use --backend {launch.by}.")
    if ":" in options.device:
        raise UserError(f"--device {options.device}: each rank has a GPU of its own.", "Leave the number out.")
    package = _package(launch.by, context)
    if fault := package.fault():
        raise fault
    device = package.choose_device(package.rank_device(options.device, launch.local_rank))
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's would run only when all have joined
    ranks = Ranks.join(package, device.value)
    signal.signal(signal.SIGTERM, handler)
    return package, ranks


def _package(name: str, context: Context) -> RankPackage:
    return cast(RankPackage, context.backends(name))


@contextmanager
def workers(options: Options, context: Context) -> Iterator[Context]:
    """The context with which this computer trains with those of --with."""
    shared = secret()
    lines = [Line(address, shared) for address in options.workers]

    made: list[SharedPackage] = []

    def package(name: str) -> BackendPackage:
        made.append(SharedPackage(_package(name, context), lines, context.display))
        return made[-1]

    try:
        yield replace(context, backends=package, end_training=lambda: context.backends)
    finally:
        for one in made:
            one.release()
        for line in lines:
            line.close()


def base_folder(given: str | None, recipe: Recipe, backend: str) -> Path:
    """What a backend of another process than the first loads. Raises UserError where it is not the recipe's model."""
    name = given or recipe.model
    base = find_base(Options(model=name), backend, recipe.quantization, Display("quiet"))
    if base.model.content_hash() != recipe.model_hash:
        raise UserError(
            f"{name} is another model here than where the training began.", "Give all machines the same model."
        )
    return base.training_base

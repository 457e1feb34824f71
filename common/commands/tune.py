"""`tune`: search learning rate, epochs, batch size, rank and dropout for a model and rows, within a budget."""

import argparse
import json
import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.commands.arguments import add_options, display_of
from common.commands.prepare import Hardware, check_request, choose_hardware, model_and_rows
from common.context import Context
from common.data.sources import named
from common.data.training_rows import TrainingRows
from common.display import Display
from common.documents import read_json
from common.errors import PROGRAM, UserError, install_extra
from common.evaluation.search import Limits, Search
from common.evaluation.search_report import judged, show_table, write_best, write_plot
from common.evaluation.search_space import SEARCHED, Space, described, search_space
from common.evaluation.study import Outcome, Study
from common.export.budget import Stage, check_disk
from common.export.fused_folder import checkpoints_disk, trained_bytes
from common.files import atomic_write
from common.models.training_base import Base, start_adapter
from common.option_fields import extra_of
from common.option_sources import absolute_paths, load_options, options_over
from common.option_translation import translate
from common.options import Options, by_flag
from common.paths import source_name, sources_name
from common.run_lock import held
from common.run_record import Run
from common.system.hardware import installed
from common.system.signals import stop_signals
from common.training.setup import ENOUGH
from common.training.trials import Trials

_FILE = "search.json"
_BEST, _PLOT = "best.yaml", "trials.svg"
_OPTIONS = [
    name
    for name, field in by_flag().items()
    if name in ("output", "save_minutes", "quiet", "json")
    or (
        extra_of(field)["heading"] in ("Model", "Data", "Training", "Adapter", "Memory and device")
        and name not in ("recipe", "sample_prompt", "on_collapse", "devices", "with")
    )
]
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Of `30m`, `2h`, `90s` or `1h30m`. Raises argparse.ArgumentTypeError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text) if re.fullmatch(r"(\d+(\.\d+)?[smh])+", text) else []
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30m, 2h or 1h30m")
    return seconds


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of trials, from 1")
    return int(text)


def tune(options: Options, given: Collection[str], limits: Limits, resumed: Path | None, context: Context) -> int:
    """Search, and show what was found. given: options that are not searched. Returns the exit status.

    Raises UserError, also where not even one trial was complete within the limits.
    """
    display = context.display
    check_request(options.model_copy(update={"export": "none", "push": None}), display)
    hardware = choose_hardware(options, context)
    base, rows, *_ = model_and_rows(options, hardware, context, {})
    _check_validation(options, rows)
    space = search_space(options, given, base, rows.train.rows)
    if not space.automatic:
        raise UserError("Nothing is left to search.", f"Leave out one of {_flags(SEARCHED)}.")
    trials = Trials(context, base, rows, hardware.backend.value, hardware.device.value, hardware.precision.value)
    automatic = space.with_settings(space.automatic)
    with display.stage("hash the model"):
        recipe = trials.recipe(automatic)
    search = {"recipe": recipe.hash(), **space.record()}
    folder = resumed or _folder(options, hardware, search)
    _check_disk(folder, automatic, base, trials)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        _write_search(folder, options, given, search)
        display.say(f"searched: {space.described()}")
        study = Study(folder, space)
        _say_state(study, folder, display)
        with stop_signals(display.stopping) as stops:
            try:
                Search(study, trials, folder, limits, display, stops).run()
            finally:
                trials.close()
        return _report(study, space, folder, bool(stops), display)


def _check_validation(options: Options, rows: TrainingRows) -> None:
    """Raises UserError where trials cannot be compared."""
    found = len(rows.scored)
    if found < ENOUGH:
        what = f"{found} validation rows" if found else "no validation row"
        raise UserError(
            f"{named(options)} has {what}, by which trials cannot be compared: at least {ENOUGH} are needed.",
            "Raise --valid-share, put more rows into the valid file of the folder, or train without a search.",
        )


def _flags(names: Collection[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _check_disk(folder: Path, options: Options, base: Base, trials: Trials) -> None:
    start = start_adapter(trials.recipe(options), base)
    checkpoints = checkpoints_disk(trained_bytes(start, base.model), options.keep_checkpoints)
    check_disk(folder, [Stage("checkpoints", 0, checkpoints)], 0)


def _folder(options: Options, hardware: Hardware, search: dict[str, Any]) -> Path:
    """--output, else the first name that is free or holds this search.

    Raises UserError where --output holds anything else.
    """
    if options.output:
        folder = Path(options.output)
        if not folder.exists() or not any(folder.iterdir()) or _is_of(folder, search):
            return folder
        if (folder / _FILE).exists():
            raise UserError(
                f"--output {folder} holds another search: of other options, rows or another model.",
                f"Give another folder; to continue that search: {PROGRAM} tune --resume {Run(folder)}",
            )
        raise UserError(f"--output {folder} is not an empty folder.", "Give a new or an empty folder.")
    name = f"{source_name(options.model)}-{sources_name(options.data)}-{hardware.backend.value}-tune"
    folder, number = Path("runs") / name, 1
    while folder.exists() and not _is_of(folder, search):
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder


def _read_search(folder: Path) -> dict[str, Any]:
    return read_json(folder / _FILE, f"Remove {folder}, or give another --output folder.")


def _is_of(folder: Path, search: dict[str, Any]) -> bool:
    """Whether the folder holds this search."""
    return (folder / _FILE).exists() and _read_search(folder).get("search") == json.loads(json.dumps(search))


def _write_search(folder: Path, options: Options, given: Collection[str], search: dict[str, Any]) -> None:
    """Raises UserError where the folder holds another search."""
    if (folder / _FILE).exists():
        if _is_of(folder, search):
            return
        raise UserError(
            f"{folder} holds another search: the model, the rows or the automatic recipe have changed.",
            "Restore them, or start a new search.",
        )
    kept = options.model_dump(by_alias=True, exclude_unset=True, exclude={"config", "resume", "output", "llama_cpp"})
    content = {"options": absolute_paths(kept), "given": sorted(given), "search": search}
    with atomic_write(folder / _FILE) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _say_state(study: Study, folder: Path, display: Display) -> None:
    if study.outcomes():
        ended = len(study.ended())
        display.say(
            f"{folder} holds this search: {ended} trial{'s are' if ended != 1 else ' is'} kept, and it continues"
        )


def _report(study: Study, space: Space, folder: Path, stopped: bool, display: Display) -> int:
    """Show and write what was found. Returns the exit status."""
    again = f"{PROGRAM} tune --resume {Run(folder)}"
    if study.best() is None:
        if stopped:
            display.warn(
                f"stopped before a trial was complete, saved. Continue with: {again} and a --budget or --trials"
            )
            return 130
        raise UserError(
            "Not even one trial was complete within the limits.", f"Continue with more: {again} --budget 2h"
        )
    chosen, why = judged(study)
    show_table(study, chosen, display)
    about = f"trial {chosen.number} of {len(study.outcomes())}, validation loss {chosen.value:.4f}; {why}"
    write_best(folder / _BEST, space, chosen.settings, about)
    with display.optional("no plot"):
        write_plot(folder / _PLOT, study)
    _show_result(chosen, why, folder, display)
    if stopped:
        display.warn(f"stopped, saved. Continue with: {again} and a --budget or --trials")
        return 130
    return 0


def _show_result(chosen: Outcome, why: str, folder: Path, display: Display) -> None:
    display.event("best", number=chosen.number, settings=chosen.settings, loss=chosen.loss, why=why)
    display.show(
        f"{why[:1].upper()}{why[1:]}.\n{folder / _BEST} is trial {chosen.number}: {described(chosen.settings)}.\n"
        f"Train it: {PROGRAM} train --config {Run(folder)}/{_BEST}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--budget TIME] [--trials N] [--option VALUE ...]"
    parser.epilog = (
        "--budget or --trials must be given; of both, the first that is reached ends the search. "
        f"Searched are {_flags(SEARCHED)}; what is given of these on the command line is fixed. Without --output the "
        f"folder is runs/<model>-<data>-<backend>-tune. Example: {parser.prog} --model google/gemma-3-270m-it --data "
        "rows.jsonl --budget 30m"
    )
    parser.add_argument("--budget", type=seconds_of, metavar="TIME", help="time that all trials may take: 30m, 2h")
    parser.add_argument(
        "--trials", type=_count, metavar="N", help="number of trials, those of an earlier start included"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="search to continue, with its own options; so does the same command",
    )
    add_options(parser, _OPTIONS, dict.fromkeys(SEARCHED))  # no defaults: they are searched


def run(args: argparse.Namespace, context: Context) -> int:
    for package in ("optuna", "matplotlib"):
        if not installed(package):
            raise UserError(f"tune needs {package}, which is not installed.", install_extra("tune"))
    if args.budget is None and args.trials is None:
        raise UserError("Neither --budget nor --trials is given.", "Say how long: --budget 30m, or --trials 20.")
    limits = Limits(args.trials or math.inf, args.budget or math.inf)
    if args.resume is None:
        options, notes = load_options(args.flags, "tune", args.allowed)
        given = [name for name in translate(args.flags)[0] if name in SEARCHED]
    else:
        options, given = _resumed(args.resume, args.flags)
        notes = []
    context = replace(context, display=display_of(options))
    for note in notes:
        context.display.say(note)
    return tune(options, given, limits, args.resume, context)


def _resumed(folder: Path, flags: dict[str, Any]) -> tuple[Options, list[str]]:
    """The options of a search, and those that it does not search. Raises UserError for what cannot be changed."""
    if not (folder / _FILE).exists():
        raise UserError(f"--resume {folder}: no search is there.", "Give the folder that tune has made.")
    changeable = [name for name in _OPTIONS if extra_of(by_flag()[name])["heading"] in ("Memory and device", "Output")]
    refused = sorted(set(flags) - set(changeable) | {"precision", "output"} & set(flags))
    if refused:
        raise UserError(
            f"--resume continues with the search's own options; it does not combine with {_flags(refused)}.",
            "Leave those out, or start a new search without --resume.",
        )
    kept = _read_search(folder)
    known, given = kept.get("options"), kept.get("given")
    if not isinstance(known, dict) or not isinstance(given, list):
        raise UserError(f"{folder / _FILE} is not what tune has written.", "Start a new search.")
    return options_over(known, flags, "tune", _OPTIONS), [name for name in SEARCHED if name in given]

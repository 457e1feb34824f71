"""`init`: from a goal, rows and a model to a commented YAML file for `train --config`; each question is a flag too."""

import argparse
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from common.commands.arguments import add_options
from common.commands.plan import estimate_run
from common.commands.prepare import Hardware, choose_hardware
from common.context import Context
from common.data.glance import MOST_ROWS, Glance, glance
from common.data.training_rows import load
from common.display import gigabytes
from common.errors import PROGRAM, UserError
from common.files import atomic_write
from common.goals import GOALS, Setting, as_yaml, settings_of
from common.models.local_models import LocalModel, local_models, named_model
from common.option_sources import load_options, options_over
from common.options import Options
from common.paths import source_name, user_path
from common.presets import preset_head, preset_names
from common.questions import ask, can_ask, choose, confirm
from common.training.model_estimate import Place
from common.training.proposals import Proposal, preset_models, propose

_NAME = re.compile(r"\w[\w.-]{,80}")
_ROWS = ["field", "on_bad_row"]  # options without which some rows cannot be read
_OTHER = ""  # a model that is typed
_SHOWN = 20  # models
_MEMORY = re.compile(r"(.+) on a CPU .+, (.+) on a Mac .+ for (.+) rows of (.+) tokens")  # of a preset


@dataclass(frozen=True)
class _Asked:
    """What is known before a model is chosen."""

    goal: str
    source: str  # of the rows
    described: str  # "messages, 400 rows"
    rows: Glance
    flags: list[Setting]  # how the rows are read
    hardware: Hardware
    place: Place

    def settings(self, four_bits: bool) -> list[Setting]:
        return [*self.flags, *settings_of(self.goal, "ja" if self.rows.japanese else "en", four_bits)]

    def proposal(self, model: LocalModel) -> Proposal:
        given = {setting.name: setting.value for setting in self.settings(False)}
        return propose(model, Options.model_validate(given), self.rows.sizes, self.place)


def setup(args: argparse.Namespace, context: Context) -> None:
    """Ask what was not given, write the file, and say what to type next."""
    _require_flags(args)
    asked = _asked(args, context)
    chosen = _model(args.model, asked, context)
    file = _file(args, f"{source_name(chosen.model.name.replace(':', '-'))}-{asked.goal}", context)
    with atomic_write(file) as temporary:
        temporary.write_text(_text(file, asked, chosen), encoding="utf-8")
    _show(file, chosen, context)
    measure = args.measure
    if measure is None and chosen.model.is_here and can_ask():
        measure = confirm("Load the model now, and measure memory and time by a few steps?")
    if measure:
        estimate_run(load_options({"config": str(file)}, "plan")[0], True, context)


def _require_flags(args: argparse.Namespace) -> None:
    """Raises UserError naming all that is missing, where nothing can be asked."""
    missing = [f"--{name}" for name in ("goal", "data", "model") if not getattr(args, name)]
    if missing and not can_ask():
        many = len(missing) > 1
        raise UserError(
            f"{', '.join(missing)} {'are' if many else 'is'} not given, and there is no terminal to ask on.",
            f"Give {'them' if many else 'it'}: --goal {'|'.join(GOALS)}, --data FILE, --model NAME.",
        )


def _asked(args: argparse.Namespace, context: Context) -> _Asked:
    goal = args.goal or choose(
        "What is the model to learn?",
        [(name, f"{name}: it {one.about} ({one.rows:,} rows or more)") for name, one in GOALS.items()],
    )

    def read(source: str) -> tuple[Options, str, Glance]:
        if not source or not user_path(source, "--data").exists():
            fix = "Give a file or folder of this machine. A data set of the hub can be named in the YAML file later."
            raise UserError(f"--data {source}: no such file or folder.", fix)
        options = options_over({"data": [source]}, args.flags, "init", args.allowed)
        found = load(options, context.display)
        return options, found.described(), glance(chain(found.train, found.valid))

    question = "File or folder with your rows (Tab completes):"
    options, described, rows = read(args.data) if args.data else ask(question, "", read, context.display)
    if len(rows.sizes) < GOALS[goal].rows:
        few = f"{len(rows.sizes)} rows are few for this goal, for which {GOALS[goal].rows:,} or more are usual"
        context.display.warn(f"{few}; validation will show what they are worth")
    hardware = choose_hardware(Options(), context)
    backend, device = hardware.backend.value, hardware.device.value
    place = Place(context.backends(backend), backend, device, hardware.precision.value, "none")
    flags = [Setting(name, getattr(options, name), "as given to init") for name in args.flags]
    return _Asked(goal, options.data[0], described, rows, flags, hardware, place)


def _model(given: str | None, asked: _Asked, context: Context) -> Proposal:
    """The model to train. Offered are those that lie here, and those of the presets, as far as they fit."""
    here = local_models(Path.home(), Path.cwd())
    if given:
        return _warned(asked.proposal(named_model(given, here)), context)
    known = {one.model for one in here}
    folders, ggufs = ([one for one in here if (one.config is None) == gguf][:_SHOWN] for gguf in (False, True))
    # what a GGUF holds has lost precision, so it comes last
    every = [*folders, *(model for model in preset_models(asked.goal) if model.model not in known), *ggufs]
    with context.display.stage("estimate the memory of models"):
        proposed = [asked.proposal(model) for model in every]
    fitting = [proposal for proposal in proposed if proposal.fits]
    if larger := len(proposed) - len(fitting):
        context.display.say(f"{larger} of {len(proposed)} models do not fit into the memory that is free")
    answers = [(proposal.model.model, proposal.described()) for proposal in fitting]
    while True:
        name = choose(
            "Which model is trained? Beside each the memory it takes.",
            [*answers, (_OTHER, "another: type its name or path")],
        )
        try:
            if name == _OTHER:
                question = "Hub name, model folder or GGUF file:"
                model = ask(question, "", lambda text: named_model(text, here), context.display)
                return _warned(asked.proposal(model), context)
            named_model(name, here)  # of a GGUF only now is looked at what is in it
            return next(proposal for proposal in fitting if proposal.model.model == name)
        except UserError as error:
            context.display.warn(f"{error.what}\n  {error.fix}")


def _warned(proposal: Proposal, context: Context) -> Proposal:
    if not proposal.fits and proposal.chosen:
        budget, why = proposal.chosen.budget, proposal.chosen.why
        context.display.warn(
            f"{proposal.model.name} needs about {proposal.memory()}, and {gigabytes(budget)} may be taken ({why})"
        )
    return proposal


def _file(args: argparse.Namespace, default: str, context: Context) -> Path:
    def check(name: str) -> Path:
        name = name.removesuffix(".yaml")
        if not _NAME.fullmatch(name):
            fix = "Use letters, digits, dots, dashes and underscores; the file is written into the current folder."
            raise UserError(f"--name {name!r} cannot be the name of a file here.", fix)
        file = Path(f"{name}.yaml")
        if not file.exists() or args.force:
            return file
        if can_ask() and confirm(f"{file} exists. Overwrite it?"):
            return file
        raise UserError(f"{file} exists.", "Give another --name, or --force to overwrite it.")

    if args.name:
        return check(args.name)
    default = re.sub(r"[^\w.-]+", "-", default).strip("-.")[:60] or "training"
    return ask("Name of the file:", default, check, context.display) if can_ask() else check(default)


def _text(file: Path, asked: _Asked, chosen: Proposal) -> str:
    model, hardware = chosen.model, asked.hardware
    count, longest = len(asked.rows.sizes), max(tokens for tokens, _ in asked.rows.sizes)
    rows = f"{'the first ' * (count == MOST_ROWS)}{count:,} rows of up to about {longest:,} tokens"
    where = f"{hardware.backend.value} on {hardware.device.value}, {hardware.precision.value}"
    head = [
        f"{model.name} {GOALS[asked.goal].about}",
        f"  {PROGRAM} plan --config {file}    memory and time, before anything is trained",
        f"  {PROGRAM} train --config {file}",
        f"memory: {chosen.memory()}{f', estimated for {rows}; {where}' if chosen.chosen else ''}",
        "Learning rate, epochs, batch size and rank are chosen for model and rows (--recipe auto). To fix one:",
        "learning_rate: 2.0e-4",
    ]
    named = f"in {model.where}" if model.is_here else f"train fetches it from {model.where}"
    named += f", as {model.name}" if model.is_here and model.name != model.model else ""
    data = Setting("data", asked.source, f"{asked.described}; some are kept for validation")
    return as_yaml(head, Setting("model", model.model, named), data, asked.settings(chosen.four_bits))


def _show(file: Path, chosen: Proposal, context: Context) -> None:
    fetched = "" if chosen.model.is_here else f" train fetches {chosen.model.name} from the hub first."
    context.display.event("written", file=str(file), model=chosen.model.model)
    context.display.show(
        f"{file} is written. Memory: {chosen.memory()}. Time: plan measures it.{fetched}\n"
        f"Memory and time: {PROGRAM} plan --config {file}\n"
        f"Train:           {PROGRAM} train --config {file}"
    )


def _list(context: Context) -> None:
    rows = [["quickstart", "", "", "the example"]]
    for name in preset_names():
        if memory := _MEMORY.fullmatch(preset_head(name)["memory"]):
            rows.append([name, memory[1], memory[2], f"{memory[3]} x {memory[4]}"])
    columns = ["name", "on a CPU", "on a Mac", "rows x tokens"]
    context.display.table(f"Presets and their memory: {PROGRAM} train --config NAME --data FILE", columns, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Without a terminal: {parser.prog} --goal persona --data rows.jsonl --model google/gemma-3-1b-it"
    parser.add_argument("--list", action="store_true", help="list the presets, and do nothing else")
    parser.add_argument("--goal", choices=list(GOALS), help="what the model is to learn")
    parser.add_argument("--data", metavar="PATH", help="file or folder of this machine with the rows")
    parser.add_argument(
        "--model", metavar="NAME", help="hub name, model folder, GGUF file, or a model of Ollama by its name there"
    )
    add_options(parser, _ROWS)
    parser.add_argument("--name", metavar="NAME", help="NAME.yaml is written; from model and goal unless given")
    parser.add_argument("--force", action="store_true", help="overwrite a file of that name")
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="then load the model and measure memory and time by a few steps, as plan does; fetches what is not here",
    )


def run(args: argparse.Namespace, context: Context) -> None:
    if args.list:
        _list(context)
    else:
        setup(args, context)

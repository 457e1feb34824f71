"""The command line out of the declared options: flags in both spellings, under headings, with help that suffices."""

import argparse
import dataclasses
import os
import types
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from common.context import Context
from common.display import Display
from common.errors import UserError
from common.option_fields import HEADINGS, extra_of
from common.option_sources import load_options
from common.option_translation import KNOWN
from common.options import Options, by_flag
from common.sampling import Sampling

_TRUTHS = ("true", "false", "yes", "no", "on", "off")


class Parser(argparse.ArgumentParser):
    """argparse that reports a fault as every other fault is reported, and shows one spelling of a flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> Any:
        fix = f"`{self.prog} --help` says what it takes."
        if "required" in message:  # `--quant Q8_0 RUN`: the option has taken it
            fix += " What has no -- stands first: an option of several values takes all that follow it."
        raise UserError(f"{message[:1].upper()}{message[1:]}.", fix)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # argparse leaves their indent out of account

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "_" not in name)
        value = action.metavar if isinstance(action, _Flag) else self._format_args(action, action.dest.upper())
        return f"{names} {value}" if value else names


class _Flag(argparse.Action):
    """Keeps the text of an option in `namespace.flags`, unjudged: all sources are validated together later."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        name = str(option_string)[2:].replace("-", "_")
        flags: dict[str, Any] = dict(namespace.flags)
        if self.nargs == "*":
            values = [*(flags[name] if isinstance(flags.get(name), list) else []), *values]
            flags[name] = values or True
        elif name in flags:
            raise UserError(f"{option_string} is given twice.", "Give it once.")
        else:
            flags[name] = values
        namespace.flags = flags


def add_options(
    parser: argparse.ArgumentParser,
    names: Iterable[str] | None = None,
    defaults: dict[str, Any] | None = None,
    refused: Collection[str] = (),
) -> None:
    """Flags for the options of `names`, all unless given, and for what other programs call them (not shown).

    defaults: shown in place of train's; None: nothing is shown. refused: values that the command does not offer.
    """
    fields = by_flag()
    chosen = list(fields) if names is None else list(names)
    parser.set_defaults(flags={}, allowed=None if names is None else chosen)
    for heading in HEADINGS:
        below = [name for name in chosen if extra_of(fields[name])["heading"] == heading]
        group = parser.add_argument_group(heading) if below else None
        for name in below:
            field = fields[name]
            text = _with_default(str(field.description), (defaults or {}).get(name, field.get_default()))
            _add(group, name, nargs_of(field), text, field, refused)
    for name in sorted(KNOWN - set(chosen)) if names is None else ():
        _add(parser, name, "*" if name in _SEVERAL else "?", argparse.SUPPRESS, None)


_SEVERAL = {"lora_target_modules", "target_modules", "lora_parameters.keys"}


def _add(parser: Any, name: str, nargs: str, text: str, field: FieldInfo | None, refused: Collection[str] = ()) -> None:
    added = parser.add_argument(
        *dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")),
        action=_Flag,
        nargs=nargs,
        const=True,
        default=argparse.SUPPRESS,
        dest=name,
        metavar=metavar_of(field, refused) if field else None,
        help=text,
    )
    if field is not None and (choices := choices_of(field, refused)):
        added.completer = lambda prefix, **more: choices  # of argcomplete


def _kind(field: FieldInfo) -> Any:
    """The annotation without its None."""
    if get_origin(field.annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(field.annotation) if kind is not type(None))
    return field.annotation


def nargs_of(field: FieldInfo) -> str:
    return "*" if get_origin(_kind(field)) in (list, dict) else "?"


def heading_of(name: str) -> str | None:
    """The heading of an option by the name of its flag; None for what other programs call it."""
    field = by_flag().get(name)
    return None if field is None else str(extra_of(field)["heading"])


def choices_of(field: FieldInfo, refused: Collection[str] = ()) -> list[str]:
    """The values that the option takes, where they are few."""
    kind = _kind(field)
    known = get_args(kind) if get_origin(kind) is Literal else extra_of(field)["choices"]
    return [value for value in known if value not in refused]


def metavar_of(field: FieldInfo, refused: Collection[str] = ()) -> str:
    """What stands for the value in help; nothing for a switch."""
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return "{" + ",".join(choices_of(field, refused)) + "}"
    if value := extra_of(field)["value"]:
        return str(value)
    if get_origin(kind) in (list, dict):
        return "NAME [NAME ...]" if get_origin(kind) is list else "NAME=VALUE [NAME=VALUE ...]"
    return {bool: "", int: "N", float: "X"}[kind]


def default_text(value: Any) -> str:
    """A default as a user would type it; empty where there is none, or where it is a switch that is off."""
    if value is None or value is False or value == {}:
        return ""
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_default(text: str, value: Any) -> str:
    shown = default_text(value)
    return f"{text} (default: {shown})" if shown else text


def joined(argv: list[str]) -> list[str]:
    """argv in which every switch brings its value along: `--quiet` is `--quiet=true`, and takes no next word."""
    switches = {name for name, field in by_flag().items() if _kind(field) is bool}
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and word[2:].replace("-", "_") in switches:
            word += f"={rest.pop(0) if rest and rest[0].lower() in _TRUTHS else 'true'}"
        words.append(word)
    return words


def unknown(extra: list[str]) -> dict[str, Any]:
    """What no parser knows, as flags, so that it is reported with all other faults. Raises UserError for words."""
    found: dict[str, Any] = {}
    name = None
    for word in extra:
        if word.startswith("--"):
            name, _, value = word[2:].replace("-", "_").partition("=")
            found[name] = value or True
        elif name is None:
            raise UserError(f"{word!r} stands where an option should.", "Options start with --, as in --model NAME.")
        else:
            found[name] = word
    return found


def read_flags(argv: list[str]) -> dict[str, Any]:
    """`--batch-size 8 --targets q_proj v_proj` as a dict of texts, lists of texts and True for what lacks its value."""
    parser = Parser()
    add_options(parser)
    namespace, extra = parser.parse_known_args(joined(argv), argparse.Namespace(flags={}))
    return namespace.flags | unknown(extra)


def display_of(options: Options) -> Display:
    """The display that the options ask for. With --quiet and --json the hub's library shows no bars beside it."""
    if options.mode() is not None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported, later
    return Display(options.mode())


def read_options(args: argparse.Namespace, context: Context) -> tuple[Options, Context]:
    """The options of `args.flags`, and the context that they ask for. Prints what was translated."""
    options, notes = load_options(args.flags, args.command)
    context = replace(context, display=display_of(options), llama_cpp=options.llama_cpp)
    for note in notes:
        context.display.say(note)
    return options, context


def count(text: str) -> int:
    """The type of an option that takes a number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def add_llama(parser: argparse.ArgumentParser) -> None:
    """--llama-cpp, for commands that take none of the other options."""
    parser.add_argument(
        "--llama-cpp",
        "--llama_cpp",
        metavar="DIR",
        help="folder of the llama.cpp build to use; else found or built once",
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """RUN, --with and --quant: the model that answers."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, its fused folder, or a GGUF file")
    parser.add_argument(
        "--with",
        dest="kind",
        choices=("gguf", "adapter", "fused", "base"),
        help="model that answers: the GGUF in llama.cpp (default), or one in the backend that trained it",
    )
    parser.add_argument("--quant", metavar="TYPE", help="GGUF of the run to use; the first unless given")


def add_system(parser: argparse.ArgumentParser, text: str) -> None:
    """--system and --system-file."""
    parser.add_argument("--system", metavar="TEXT", help=f"{text}, or @FILE")
    parser.add_argument("--system-file", "--system_file", type=Path, metavar="FILE", help=f"file with the {text}")


def check_llama(is_gguf: bool, context: Context) -> None:
    """Raises UserError where --llama-cpp is given and no GGUF is read or written."""
    if context.llama_cpp is not None and not is_gguf:
        raise UserError("--llama-cpp is for a GGUF, and none is read or written here.", "Leave it out.")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags for the fields of Sampling."""
    group = parser.add_argument_group("Sampling")
    for field in dataclasses.fields(Sampling):
        kind = float if isinstance(field.default, float) else int
        group.add_argument(
            *dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}")),
            type=kind,
            default=field.default,
            metavar="X" if kind is float else "N",
            help=_with_default(field.metadata["help"], field.default),
        )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What add_sampling's flags ask for. Raises UserError for values out of range."""
    found = Sampling(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Sampling)})
    found.check()
    return found

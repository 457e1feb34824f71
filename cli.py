"""Twintune's front door: parses, runs one command, turns a UserError into text and an exit status."""

import sys

if sys.platform == "win32":  # before the imports that need fcntl
    sys.exit("error: Twintune runs on Linux and macOS, not on Windows itself.\nfix:   Install and start it in WSL.")

import argparse
import importlib
import io
import logging
import os
import signal
import traceback
from contextlib import suppress
from importlib import metadata
from typing import Any

from common import strict_json
from common.commands.arguments import Parser, joined, unknown
from common.context import Context
from common.display import Display, shown
from common.errors import PROGRAM, UserError, first_line, masked, nearest, os_fault

_ABOUT = "Fine-tune a language model with LoRA on your own machine, and export it as a Q4 GGUF."
# Each is a module of common/commands with `add_arguments(parser)` and `run(args, context)`.
COMMANDS = {
    "init": "ask for goal, rows and model, and write a commented YAML file for train; list the presets",
    "migrate": "turn a configuration of mlx-lm, Axolotl, LLaMA-Factory, TRL or Unsloth into one for train",
    "train": "fine-tune a model on your rows and export it; without options, the built-in example",
    "plan": "estimate memory and time of train with the same options; train nothing",
    "tune": "search learning rate, epochs, batch size, rank and dropout, and write the best recipe",
    "check-data": "count rows and tokens, list suspicious rows, show which tokens are trained",
    "fuse": "fuse the adapter of a finished run and export it again",
    "verify": "check that what llama.cpp runs is what was trained",
    "attest": "write a file about a run that a stranger can check, or check one",
    "eval": "judge a run or a model on rows that it was not trained on: losses and scored answers",
    "chat": "chat with the model of a run",
    "generate": "answer every prompt of a file, as rows in the training format",
    "serve": "serve the GGUF of a run as an OpenAI-compatible endpoint",
    "report": "write the page about a run again: curves, answers, data, recipe, export",
    "compare": "put runs side by side: recipe, speed, memory, losses",
    "worker": "help a training on another computer (train --with)",
    "push": "upload a finished run to the hub",
    "adapter": "inspect or convert an adapter of PEFT, mlx-lm or llama.cpp",
    "llama": "build, find or remove llama.cpp",
    "doctor": "show what is installed, and what is missing for which step",
    "schema": "print every option of train as a JSON schema or a Markdown page",
    "completion": "print the shell completion for bash, zsh or fish",
}


def _module(command: str) -> Any:
    return importlib.import_module(f"common.commands.{command.replace('-', '_')}")


def build_parser(command: str | None) -> Parser:
    """The parser, with the arguments of `command` only: no other command's module is imported."""
    parser = Parser(prog=PROGRAM, description=_ABOUT, epilog=f"{PROGRAM} COMMAND --help lists what a command takes.")
    parser.add_argument("--version", action="version", version=f"twintune {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog=PROGRAM)
    for name, line in COMMANDS.items():
        added = commands.add_parser(name, help=line, description=f"{line[:1].upper()}{line[1:]}.")
        if name == command:
            _module(name).add_arguments(added)
    return parser


def known_flags(parser: Parser) -> list[str]:
    """Every flag of the parser and of its command, in one spelling, without its dashes."""
    flags = [flag.lstrip("-") for action in parser._actions for flag in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags += [flag for command in action.choices.values() for flag in known_flags(command)]
    return [flag for flag in flags if "_" not in flag]


def _backend(name: str) -> Any:
    return importlib.import_module(f"{name}_backend")


def _version() -> str:
    try:
        return metadata.version("twintune")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _run(argv: list[str]) -> int:
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        fix = f"`{PROGRAM} --help` lists the commands."
        raise UserError(f"{command!r} is not a command; {nearest(command, list(COMMANDS))}".rstrip("; "), fix)
    parser = build_parser(command)
    args, extra = parser.parse_known_args(joined(argv))
    if args.command is None:
        parser.print_help()
        return 2
    if extra and not hasattr(args, "flags"):
        fix = f"`{PROGRAM} {args.command} --help` says what it takes."
        given = extra[0].partition("=")[0]
        similar = nearest(given.lstrip("-"), known_flags(parser)) if given.startswith("-") else ""
        raise UserError(
            f"{given!r} is not an argument of {args.command}{f'; {similar}' if similar else '.'}".strip(), fix
        )
    if hasattr(args, "flags"):
        args.flags |= unknown(extra)
    context = Context(_backend, Display(), getattr(args, "llama_cpp", None))
    return _module(args.command).run(args, context) or 0


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # so that servers and temporary files are cleaned up


def _complain(text: str) -> None:
    try:
        print(shown(text), file=sys.stderr, flush=True)
    except OSError:
        pass  # the terminal is gone; the exit status still says what happened


class _ShownRecord(logging.LogRecord):
    """A library's log line, which may quote a stranger's file."""

    def getMessage(self) -> str:
        return shown(masked(super().getMessage()))


def _show_all() -> None:
    """What Python and libraries print by themselves is shown like everything else: it steers no terminal."""
    logging.setLogRecordFactory(_ShownRecord)
    logging.captureWarnings(True)
    sys.excepthook = lambda *raised: _complain("".join(traceback.format_exception(*raised)).rstrip())


def _handle_signals() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup's stays
        signal.signal(signal.SIGHUP, _terminated)


def _complete() -> None:
    """Answer the shell's completion and exit; it calls the program with its line in COMP_LINE."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()[1:]
    argcomplete.autocomplete(build_parser(next((word for word in words if word in COMMANDS), None)))


def _report(error: BaseException) -> int:
    """Print what went wrong as one fault with its remedy; the exit status."""
    if isinstance(error, KeyboardInterrupt):
        _complain("stopped")
        return 130
    fault = os_fault(error, "give the command again.") if isinstance(error, OSError) else error
    if isinstance(fault, UserError):
        what, fix = fault.what, fault.fix
    else:
        what = f"this is a bug: {type(error).__name__}: {first_line(error)}"
        fix = "Report it. TWINTUNE_TRACEBACK=1 shows where."
    _complain(f"error: {what}\nfix:   {fix}")
    if "--json" in sys.argv:
        with suppress(OSError):
            print(strict_json.dumps({"event": "error", "what": shown(what), "fix": shown(fix)}), flush=True)
    if os.environ.get("TWINTUNE_TRACEBACK"):
        raise error
    return 1


def _reopen() -> None:
    """Give a standard stream that was closed (`>&-`) a file of nothing: Python has None there."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  # until the end


def _flush() -> None:
    """What a full disk has refused is given up: Python would end with an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main() -> None:
    _reopen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in a locale that lacks a letter
    _handle_signals()
    _show_all()
    try:
        if "_ARGCOMPLETE" in os.environ:
            _complete()
        status = _run(sys.argv[1:])
    except BrokenPipeError:  # the reader has seen enough: `train --help | head`
        status = 0  # and _flush gives up the rest
    except (Exception, KeyboardInterrupt) as error:
        status = _report(error)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # it ends anyhow, and all is cleaned up
    _flush()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

"""`llama build`, `llama where` and `llama clean`."""

import argparse

from common.commands.arguments import add_llama
from common.context import Context
from common.display import Display, gigabytes
from common.errors import UserError
from common.llama_cpp.build import own
from common.llama_cpp.install import clean, find


def build_llama(display: Display) -> None:
    with display.stage("build llama.cpp") as progress:
        built = own(progress)
    display.say(f"llama.cpp {built.version}: {built.where}")


def where_llama(llama_cpp: str | None, display: Display) -> None:
    """Raises UserError where none is there yet, or --llama-cpp names one that cannot be used."""
    llama = find(llama_cpp)
    if llama is None:
        raise UserError(
            "There is no llama.cpp yet.", "Build it: python cli.py llama build, or name one: --llama-cpp DIR"
        )
    tools = {
        "converter": llama.converter,
        "llama-quantize": llama.quantize,
        "llama-server": llama.server,
        "llama-imatrix": llama.imatrix or "not there: --imatrix cannot be used with it",
        "twintune-logits": llama.logits or "not there: verify takes it from our own build, made where it is missing",
    }
    facts = {"where": llama.where, "version": llama.version}
    display.panel("llama.cpp", facts | {name: str(path) for name, path in tools.items()})


def clean_llama(display: Display) -> None:
    removed = clean()
    for folder, size in removed:
        display.say(f"removed {folder.name}, {gigabytes(size)}")
    if not removed:
        display.say("There was nothing to remove.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("build", help="build the pinned llama.cpp now, once; continues where it was stopped")
    add_llama(actions.add_parser("where", help="show which llama.cpp is used, of which version, and its tools"))
    actions.add_parser("clean", help="remove what build made, of every version")


def run(args: argparse.Namespace, context: Context) -> None:
    if args.action == "build":
        build_llama(context.display)
    elif args.action == "where":
        where_llama(context.llama_cpp, context.display)
    else:
        clean_llama(context.display)

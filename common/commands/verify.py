"""`verify RUN`: exits with status 1 where a GGUF is not what was trained."""

import argparse
from pathlib import Path

from common.commands.arguments import add_llama
from common.context import Context
from common.export.model_card import write_card
from common.report.page import write_own_report
from common.run_lock import held
from common.run_record import Run
from common.verify.judge import verdict
from common.verify.verify import verify_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Compares tokens, prompts, stops and distributions. Exits with status 1 if they differ."
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder with a fused folder and a GGUF")
    add_llama(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    found = verdict(verify_run(args.run, context))
    with context.display.optional("no model card"), held(args.run):
        write_card(Run(args.run))
        write_own_report(Run(args.run), context.display)
    return 1 if found == "broken" else 0

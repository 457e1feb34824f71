"""`verify RUN`: exits with status 1 where a GGUF is not what was trained."""

import argparse
from pathlib import Path

from common.commands.arguments import add_llama
from common.context import Context
from common.verify.judge import verdict
from common.verify.verify import verify_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Compares tokens, prompts, stops and distributions. Exits with status 1 if they differ."
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder with a fused folder and a GGUF")
    add_llama(parser)


def run(args: argparse.Namespace, context: Context) -> int:
    return 1 if verdict(verify_run(args.run, context)) == "broken" else 0

"""`migrate FILE`: a configuration of another program as one for train, every line explained."""

import argparse
from pathlib import Path

from common.context import Context
from common.errors import PROGRAM, UserError
from common.files import atomic_write
from common.migration import migrated
from common.other_configs import TOOLS, read_config, recognized


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Scripts and notebooks are read, never run. What is left out is listed at the end of the result."
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="YAML or JSON of another program, or Unsloth's script or notebook"
    )
    parser.add_argument(
        "--from", dest="tool", choices=TOOLS, help="program that the file is for; told from its keys unless given"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="new file to write; shown unless given")


def run(args: argparse.Namespace, context: Context) -> None:
    values, unread = read_config(args.file)
    text = migrated(args.file, values, args.tool or recognized(args.file, values), unread)
    if args.output is None:
        context.display.show(text.rstrip("\n"), kind="config")
        return
    if args.output.exists():
        raise UserError(f"--output {args.output} is there already.", "Give a new name.")
    with atomic_write(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    context.display.show(
        f"{args.output} is written: read its comments, then {PROGRAM} plan --config {args.output}",
        kind="written",
        file=str(args.output),
    )

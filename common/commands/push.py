"""`push RUN REPO`: a finished run to the hub."""

import argparse
from pathlib import Path

from common.context import Context
from common.export.model_card import PARTS
from common.export.upload import Upload, push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Uploads the fused model, adapter/, gguf/, the card and the license files of the base in one commit."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("repo", metavar="REPO", help="owner/name, or name alone for your own")
    parser.add_argument(
        "--what", nargs="+", choices=PARTS, default=[], help="parts to upload; all that there are unless given"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private by default")
    parser.add_argument(
        "--anyway", action="store_true", help="upload also a run that `verify` calls broken; its card says so"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list every file with its size and target; upload nothing"
    )


def run(args: argparse.Namespace, context: Context) -> None:
    asked = Upload(tuple(args.what), not args.public, args.dry_run, args.anyway)
    push(args.run, args.repo, asked, context.display)

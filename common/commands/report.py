"""`report RUN`: the page about a run, written again."""

import argparse
from pathlib import Path

from common.context import Context
from common.report.page import write_report
from common.report.texts import LANGS
from common.run_record import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "train writes the page by itself; this writes it again, for a run of any age."
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--lang", choices=LANGS, default="en", help="language of the page (default: en)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write; report.html of the run unless given"
    )
    parser.add_argument(
        *("--no-text", "--no_text"),
        nargs="?",  # the front door gives train's switches their value
        const="true",
        default="false",
        choices=("true", "false"),
        help="show no row, no sample and no answer, only figures",
    )


def run(args: argparse.Namespace, context: Context) -> None:
    path = write_report(Run(args.run), args.lang, args.output, texts_shown=args.no_text == "false")
    context.display.show(f"The report is in {path}", kind="report", path=str(path))

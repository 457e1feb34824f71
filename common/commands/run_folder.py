"""The folder of a new run: the one that is given, or the first free name."""

from pathlib import Path

from common.errors import UserError
from common.options import Options
from common.paths import source_name, sources_name
from common.run_lock import LOCK
from common.run_record import Run

# What a new run writes before its record.
FIRST_FILES = (
    *("recipe.yaml", "plan.yaml", "chat_template.jinja", "environment.json", "verify-cases.json"),
    *("report.json", "report.html"),
)


def folder_of(options: Options, backend: str) -> Path:
    """Raises UserError where --output holds anything."""
    if options.output:
        run = Path(options.output)
        check_unused(run)
        if run.exists() and not (run.is_dir() and _unused(run)):
            raise UserError(f"--output {run} is not an empty folder.", "Give a new or an empty folder.")
        return run
    return free_name(Path("runs") / f"{source_name(options.model)}-{sources_name(options.data)}-{backend}")


def _unused(run: Path) -> bool:
    """Whether the folder is empty, but for what a start that never got a record left: its lock, and what came after."""
    names = {path.name for path in run.iterdir()}
    others = {name for name in names - {LOCK, *FIRST_FILES} if not name.startswith(".twintune-")}
    return not names or (LOCK in names and not others)


def check_unused(run: Path) -> None:
    """Raises UserError where the folder holds a run."""
    if Run(run).record_file.exists():
        raise UserError(
            f"--output {run} holds another run.",
            f"Continue it (python cli.py train --resume {run}), or give another folder.",
        )


def free_name(run: Path) -> Path:
    """`run`, or the first of `run-2`, `run-3` ... that does not exist."""
    name, number = run.name, 1
    while run.exists():
        number += 1
        run = run.with_name(f"{name}-{number}")
    return run

"""A program of llama.cpp that writes one file: under a temporary name, which becomes the final one when it succeeds."""

from dataclasses import dataclass
from pathlib import Path

from common.backend import Progress
from common.errors import Unable, UserError
from common.files import atomic_write
from common.llama_cpp.install import OF_ANOTHER_CPU
from common.system.process import failed_by_machine, fraction, of_another_cpu, run_logged

OUT = "<out>"  # in a command: where the path of the file to write belongs


@dataclass(frozen=True)
class ToolRun:
    """One run of a program. title: what it does, for the display and errors. command: its arguments, OUT among them.

    remedy: what the user can do where it fails. env, cwd: the process's; ours where None.
    """

    title: str
    command: list[str]
    remedy: str
    env: dict[str, str] | None = None
    cwd: Path | None = None


def without_log(error: UserError, out: Path) -> UserError:
    """The error of `write_file` without the place of its log: `out` is in a folder that is removed with both."""
    return type(error)(error.what.replace(f"Its log, {_log(out)}, ends", "Its log ends"), error.fix)


def _log(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def write_file(run: ToolRun, out: Path, progress: Progress) -> None:
    """Run the program and give `out` its name. UserError where it fails, with its last lines; its log stays then."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = _log(out)
    log.unlink(missing_ok=True)  # of a run that failed
    progress(0.0, run.title)

    def advance(line: str) -> None:
        done = fraction(line)
        if done is not None:
            progress(done, run.title)

    with atomic_write(out.absolute()) as temporary:
        command = [str(temporary) if word == OUT else word for word in run.command]
        code, tail = run_logged(command, log, advance, run.env, run.cwd)
        if code != 0 or not temporary.is_file():
            kind = Unable if failed_by_machine(code, tail.splitlines()) else UserError
            remedy = OF_ANOTHER_CPU if of_another_cpu(code) else run.remedy
            raise kind(f"{run.title} failed (exit status {code}). Its log, {log}, ends with:\n{tail}", remedy)
    log.unlink(missing_ok=True)
    progress(1.0, run.title)

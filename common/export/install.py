"""`--install`: the GGUF put where Ollama or LM Studio finds it. A failure is a warning: the export is complete."""

import hashlib
import os
import re
import shlex
import shutil
from pathlib import Path

from common.display import Display
from common.errors import UserError
from common.export.modelfile import SPLIT_NOTE, merge_command
from common.files import atomic_write
from common.llama_cpp.install import which
from common.models.local_models import lm_studio_folders
from common.run_record import Run
from common.system.process import offline_environment, run_logged

_PUBLISHER = "twintune"  # before the name in both programs, so that no model of the user's own is replaced


def install(run: Run, programs: list[str], display: Display) -> list[str]:
    """Put the run's first GGUF into each program that was asked for. Returns those that it could not be put into."""
    into, failed = {"ollama": _into_ollama, "lmstudio": _into_lm_studio}, [*programs]
    for program in programs:
        with display.optional(f"not put into {program}; the export is complete"):
            into[program](run, display)
            failed.remove(program)
    return failed


def model_name(run: Run) -> str:
    """What the programs call the model: the run's name, in letters that both take.

    Where other letters are left out, digits of the name's hash make it differ from other names.
    """
    folder = run.path.resolve().name
    plain = re.sub(r"\s+", "-", folder.lower())
    name = re.sub(r"[^a-z0-9._-]+", "-", plain).strip("._-")[:80]
    return name if name == plain else f"{name or 'model'}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"


def _into_ollama(run: Run, display: Display) -> None:
    """`ollama create`. Raises UserError with the command to type later."""
    first, name, modelfile = run.record.export.gguf[0], f"{_PUBLISHER}/{model_name(run)}", run.gguf / "Modelfile"
    command = f"ollama create {name} -f {shlex.quote(str(modelfile))}"
    if first.parts and not (whole := run.gguf / f"model-{first.name}.gguf").is_file():
        merge = merge_command(shlex.quote(str(run.path / first.file)), shlex.quote(str(whole)))
        raise UserError(f"{SPLIT_NOTE} {merge}. Then: {command}", "")
    if not modelfile.is_file():
        raise UserError(f"there is no {modelfile}", "")
    if (program := which("ollama")) is None:
        raise UserError(f"Ollama is not installed here. Where it is: {command}", "")
    log = run.gguf / "ollama.log"
    log.unlink(missing_ok=True)
    with display.stage("ollama create"):
        code, tail = run_logged(
            [program, "create", name, "-f", str(modelfile.absolute())], log, lambda line: None, offline_environment()
        )
    if code != 0:
        raise UserError(f"`ollama create` failed (exit status {code}): {tail[-500:]}. Try again: {command}", "")
    log.unlink()
    display.say(f"in Ollama: ollama run {name}")


def _into_lm_studio(run: Run, display: Display) -> None:
    """Each file linked, or copied, into LM Studio's models folder. Raises UserError where there is none."""
    export = run.record.export
    files = [*export.gguf[0].files, *([export.mmproj] if export.mmproj else [])]
    roots = lm_studio_folders(Path.home())
    root = next((folder for folder in roots if folder.is_dir()), None)
    if root is None:
        raise UserError(
            f"LM Studio's models folder is not here. Where it is: lms import {shlex.quote(str(run.path / files[0]))}",
            "",
        )
    folder = root / _PUBLISHER / model_name(run)
    folder.mkdir(parents=True, exist_ok=True)
    if earlier := {*folder.glob("*.gguf")}:  # of a run of this name, which has its own
        display.say(f"{folder}: what an earlier run or export of this name put there is replaced")
    for file in files:
        with atomic_write(folder / Path(file).name) as temporary:
            try:
                os.link(run.path / file, temporary)
            except OSError:  # another disk
                shutil.copyfile(run.path / file, temporary)
    for old in earlier - {folder / Path(file).name for file in files}:
        old.unlink()
    display.say(f"in LM Studio: {_PUBLISHER}/{folder.name}, in {folder}")

"""The run folder: its record, recipe and plan, and who may write into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import strict_json
from common.documents import read_json, read_yaml
from common.errors import UserError
from common.files import atomic_write
from common.recipe import Plan, Recipe


def read_run(run: Path, *needed: str) -> dict[str, Any]:
    """run.json. Raises UserError where the folder holds no run, or its record lacks a key of `needed`.

    A run may be a stranger's, so the one option that names a program, `llama_cpp`, is never among its `options`; it
    stands under `named_llama_cpp`, for say_llama.
    """
    try:
        content = read_json(run / "run.json", "Give another run.", allow_nan=True)  # an older version wrote NaN
    except FileNotFoundError:
        raise UserError(f"{run} holds no run (no run.json).", "Give a folder that `train` made.") from None
    if missing := set(needed) - content.keys():
        lacks = f": it lacks {', '.join(sorted(missing))}"
        raise UserError(f"{run / 'run.json'} is no run's record{lacks}.", "Give a folder that `train` made.")
    if isinstance(options := content.get("options"), dict):
        content["named_llama_cpp"] = options.pop("llama_cpp", None)
    return content


def read_complete(run: Path, *needed: str) -> dict[str, Any]:
    """run.json of a run that is trained to its end. Raises UserError where it is not, and as `read_run`."""
    known = read_run(run, "status", *needed)
    if known["status"] != "complete":
        raise UserError(f"{run} has not finished training.", f"Finish it: python cli.py train --resume {run}")
    return known


def update_run(run: Path, **facts: Any) -> dict[str, Any]:
    """Merge `facts` into run.json, atomically."""
    path = run / "run.json"
    content = (read_json(path, "Give another run.", allow_nan=True) if path.exists() else {}) | facts
    with atomic_write(path) as temporary:
        temporary.write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _yaml(path: Path) -> Any:
    try:
        return read_yaml(path, "Give another run.")
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no whole run: it has no {path.name}.", "Give the whole folder.") from None


def read_plan(run: Path) -> Plan:
    return Plan.model_validate(_yaml(run / "plan.yaml"))


def read_recipe(run: Path) -> Recipe:
    return Recipe.model_validate(_yaml(run / "recipe.yaml"))


LOCK = ".lock"  # it stays in the folder: whoever removed it would let a third process lock another file of that name


def refuse_links(run: Path) -> None:
    """Raises UserError where something in the run folder is a link that leads out of it.

    A run may be a stranger's: what is written there, under a name that is known beforehand, must not land elsewhere.
    """
    inside = run.resolve()
    strays = [
        path for path in sorted(run.rglob("*")) if path.is_symlink() and not path.resolve().is_relative_to(inside)
    ]
    if strays:
        shown = ", ".join(f"{path.relative_to(run)} to {path.resolve()}" for path in strays)
        raise UserError(
            f"{run}: links in it lead out of the folder: {shown}.",
            "Remove them; where you trust one, put the file itself in its place.",
        )


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run folder. Raises UserError where another process holds it, and as refuse_links.

    The system lets go when the process ends, however it ends.
    """
    from filelock import FileLock, Timeout

    refuse_links(run)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{run} is being trained, exported or verified by another process.", "Wait for it, or stop it first."
        ) from None
    try:
        yield
    finally:
        lock.release()

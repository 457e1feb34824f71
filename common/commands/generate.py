"""`generate RUN`: an answer to every prompt of a file, as rows in the training format."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from common.commands.arguments import add_llama, add_sampling, add_system, add_target, check_llama, count, sampling_of
from common.context import Context
from common.data.dataset import Example
from common.data.load import SHOWN_FAULTS
from common.display import Display
from common.documents import parse_json
from common.errors import UserError
from common.files import atomic_write, errors_naming
from common.inference.answers import ask_all
from common.inference.chat_models import Target, choose, opened
from common.inference.prompts import read_prompts, system_text
from common.run_record import Run
from common.sampling import Sampling
from common.system.cache import try_lock


@dataclass(frozen=True)
class Answers:
    """What to answer and where to. length: tokens of a prompt and its answer; slots: answers made at once."""

    rows: list[Example]
    out: Path
    length: int
    slots: int = 1


def generate(target: Target, wanted: Answers, sampling: Sampling, context: Context) -> None:
    """Write `wanted.out` completely or not at all; the same command continues a stopped job from its .part file.

    Raises UserError before anything is loaded where something is missing; and at the end where the model refused
    prompts: they stand in `wanted.out` without an answer, and the same command asks them again.
    """
    display, rows, out, slots = context.display, wanted.rows, wanted.out, wanted.slots
    part = out.with_name(f"{out.name}.part")
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UserError(f"--out {out}: rows are written as JSONL.", "Give a name that ends in .jsonl")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: its folder does not exist, or cannot be written to.", "Make the folder first.")
    asked = _asked_for(target, rows, sampling)
    with _held(part, out) as file:
        done = _earlier(file, part, asked)
        if out.exists() and not done:
            raise UserError(f"--out {out} exists already.", "Give another name, or remove it.")
        left = [number for number in range(len(rows)) if done.get(number, _REFUSED)["finish"] == "error"]
        finished = len(rows) - len(left)
        if finished:
            display.say(f"{part}: {finished} of {len(rows)} answers exist already")
        if left:
            with (
                opened(target, context, wanted.length, slots) as models,
                display.stage("answers") as progress,
            ):

                def keep(number: int, row: dict[str, Any]) -> None:
                    nonlocal finished
                    done[number] = row
                    with errors_naming(part):
                        if not os.fstat(file.fileno()).st_size:
                            file.write(json.dumps(asked).encode() + b"\n")
                        file.write(json.dumps({"number": number, "row": row}, ensure_ascii=False).encode() + b"\n")
                        file.flush()
                    finished += 1
                    progress(min(1.0, finished / len(rows)), f"{finished} of {len(rows)}")

                ask_all(models.tuned, {number: rows[number] for number in left}, sampling, slots, keep)
        _finish(out, part, rows, [done[number] for number in range(len(rows))], display)


@contextmanager
def _held(part: Path, out: Path) -> Iterator[BinaryIO]:
    """The .part file, locked; it is made where there is none, and removed where no answer came.

    Raises UserError where another process has it.
    """
    file = part.open("a+b")
    try:
        with errors_naming(part):
            # no name is left: the other process has finished since it was opened here
            if not try_lock(file.fileno()) or not os.fstat(file.fileno()).st_nlink:
                raise UserError(f"Another process is answering into {out}.", "Wait for it, or give another --out.")
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                part.unlink()
    finally:
        with errors_naming(part):
            file.close()


_REFUSED = {"finish": "error"}


def _finish(out: Path, part: Path, rows: list[Example], answers: list[dict[str, Any]], display: Display) -> None:
    """Write all rows. Raises UserError where some were refused; `part` stays then, so that they can be asked again."""
    with atomic_write(out) as temporary:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        temporary.write_text(lines, encoding="utf-8")
    cut = sum(answer["finish"] == "length" for answer in answers)
    refused = [f"{row.source}: {a['error']}" for row, a in zip(rows, answers, strict=True) if a["finish"] == "error"]
    count = len(rows) - len(refused)
    display.say(f"{count} answers in {out}" + (f"; {cut} were cut at --max-tokens or --context" if cut else ""))
    if not refused:
        part.unlink()
        return
    more = [f"... and {len(refused) - SHOWN_FAULTS} more"] if len(refused) > SHOWN_FAULTS else []
    raise UserError(
        f'{len(refused)} of {len(rows)} prompts were refused; in {out} they have "finish": "error":\n'
        + "\n".join([*refused[:SHOWN_FAULTS], *more]),
        "Give the same command again, with a larger --context where that is too small: it asks these prompts alone.",
    )


def _asked_for(target: Target, rows: list[Example], sampling: Sampling) -> dict[str, str]:
    """The first line of a .part: a hash of all that the answers depend on. With another it cannot be continued.

    --context is not among it: with a larger one refused prompts are asked again, and answers are kept.
    """
    model: list[Any] = [target.kind, str(target.path.resolve())]
    if target.kind == "gguf":
        model += [target.path.stat().st_size, target.path.stat().st_mtime_ns]
    else:  # not run.json as a file: verify, push and attest write into it
        record = Run(target.path).record
        model += [record.recipe_hash, record.exported_step]
        model += [record.export.fused, record.export.fuse_into] if target.kind == "fused" else []
    asked = [model, asdict(sampling), [[row.messages, row.tools] for row in rows]]
    return {"asked": hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest()}


def _earlier(file: BinaryIO, part: Path, asked: dict[str, str]) -> dict[int, dict[str, Any]]:
    """The answers that an earlier process has written, by row. The file is repaired; without answers it is emptied.

    Raises UserError where it was asked for something else, or a line is damaged.
    """
    file.seek(0)
    *lines, torn = file.read().split(b"\n")
    remedy, found = "Remove it, or give another --out.", dict[int, dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        try:
            content = parse_json(line, allow_nan=True)
        except ValueError as error:
            raise UserError(f"{part} line {number} is {error}", remedy) from None
        if number == 1:
            if content != asked and (len(lines) > 1 or content.keys() != asked.keys()):
                raise UserError(f"{part} holds answers to other prompts, or other settings.", remedy)
        elif isinstance(content.get("number"), int) and "finish" in (content.get("row") or ()):
            found[content["number"]] = content["row"]
        else:
            raise UserError(f"{part} line {number} holds no answer.", remedy)
    with errors_naming(part):
        file.truncate(file.tell() - len(torn) if found else 0)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A stopped job continues when the same command is given again."
    add_target(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="rows in any format that train reads, with answers or without; or a .txt file with a prompt a line",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to make")
    add_system(parser, "system prompt for rows without one")
    parser.add_argument(
        "--context",
        type=count,
        default=4096,
        metavar="N",
        help="most tokens of a prompt and its answer (default: 4096)",
    )
    parser.add_argument(
        "--slots", type=count, metavar="N", help="answers that llama.cpp makes at once from a GGUF (default: 4)"
    )
    add_llama(parser)
    add_sampling(parser)


def run(args: argparse.Namespace, context: Context) -> None:
    sampling, target = sampling_of(args), choose(args.run, args.kind, args.quant)
    check_llama(target.kind == "gguf", context)
    rows = read_prompts(args.prompts, system_text(args.system, args.system_file))
    if target.kind != "gguf" and args.slots is not None:
        raise UserError(
            f"--slots is for a GGUF, and --with {target.kind} answers one prompt after the other.", "Leave it out."
        )
    slots = 1 if target.kind != "gguf" else 4 if args.slots is None else args.slots
    generate(target, Answers(rows, args.out, args.context, slots), sampling, context)

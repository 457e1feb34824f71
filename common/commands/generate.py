"""`generate RUN`: an answer to every prompt of a file, as rows in the training format."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.commands.arguments import add_llama, add_sampling, add_system, add_target, check_llama, sampling_of
from common.context import Context
from common.data.dataset import Example
from common.documents import parse_json
from common.errors import UserError
from common.files import atomic_write
from common.inference.backend_chat import ChatModel
from common.inference.chat_models import Target, choose, opened
from common.inference.prompts import read_prompts, system_text
from common.run_record import Run
from common.sampling import Sampling


@dataclass(frozen=True)
class Answers:
    """What to answer and where to. length: tokens of a prompt and its answer; slots: answers made at once."""

    rows: list[Example]
    out: Path
    length: int
    slots: int = 1


def generate(target: Target, wanted: Answers, sampling: Sampling, context: Context) -> None:
    """Write `wanted.out` completely or not at all; the same command continues a stopped job from its .part file.

    Raises UserError before anything is loaded where something is missing.
    """
    display, rows, out, slots = context.display, wanted.rows, wanted.out, wanted.slots
    if slots < 1:
        raise UserError(f"--slots {slots}: must be 1 or more.", "Leave it out.")
    if out.exists():
        raise UserError(f"--out {out} exists already.", "Give another name, or remove it.")
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UserError(f"--out {out}: rows are written as JSONL.", "Give a name that ends in .jsonl")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: its folder does not exist, or cannot be written to.", "Make the folder first.")
    part = out.with_name(f"{out.name}.part")
    done = _begun(part, _asked_for(target, rows, sampling, wanted.length))
    if len(done) > 1:
        display.say(f"{part}: {len(done) - 1} of {len(rows)} answers exist already")
    left = [number for number in range(len(rows)) if number not in done]
    if left:
        with (
            opened(target, context, wanted.length, slots, _FLAGS) as models,
            display.stage("answers") as progress,
            part.open("a", encoding="utf-8") as file,
        ):

            def keep(number: int, row: dict[str, Any]) -> None:
                done[number] = row
                file.write(json.dumps({"number": number, "row": row}, ensure_ascii=False) + "\n")
                file.flush()

            _ask_all(models.tuned, rows, left, sampling, slots, keep, progress)
    lines = [json.dumps(done[number], ensure_ascii=False) + "\n" for number in range(len(rows))]
    with atomic_write(out) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    part.unlink()
    cut = sum(done[number]["finish"] == "length" for number in range(len(rows)))
    display.say(f"{len(rows)} answers in {out}" + (f"; {cut} were cut at --max-tokens or --context" if cut else ""))


_FLAGS = ("--reasoning-format", "none", "--skip-chat-parsing")  # a tool call is kept as the model wrote it


def _ask_all(
    model: ChatModel,
    rows: list[Example],
    left: list[int],
    sampling: Sampling,
    slots: int,
    keep: Callable[[int, dict[str, Any]], None],
    progress: Progress,
) -> None:
    finished = len(rows) - len(left)

    def ask(number: int) -> dict[str, Any]:
        row, text, finish = rows[number], "", None
        with closing(model.answer(row.messages, sampling.for_row(number), row.tools)) as pieces:
            for piece, end in pieces:
                text, finish = text + piece, end
        answered = {"messages": [*row.messages, {"role": "assistant", "content": text}], "finish": finish}
        return answered | ({"tools": list(row.tools)} if row.tools else {})

    if slots == 1:  # in this thread: a backend's framework may not be called from another
        for count, number in enumerate(left, finished + 1):
            keep(number, ask(number))
            progress(count / len(rows), f"{count} of {len(rows)}")
        return
    pool = ThreadPoolExecutor(slots)
    try:
        jobs = {pool.submit(ask, number): number for number in left}
        for count, job in enumerate(as_completed(jobs), finished + 1):
            keep(jobs[job], job.result())
            progress(count / len(rows), f"{count} of {len(rows)}")
    finally:  # the server ends next, and with it the answers that are under way
        pool.shutdown(wait=False, cancel_futures=True)


def _asked_for(target: Target, rows: list[Example], sampling: Sampling, length: int) -> str:
    """A hash of everything that the answers depend on; a .part with another hash cannot be continued."""
    file = target.path if target.kind == "gguf" else Run(target.path).record_file
    model = [target.kind, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    asked = [model, asdict(sampling), length, [[row.messages, row.tools] for row in rows]]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def _begun(part: Path, asked: str) -> dict[int, dict[str, Any]]:
    """The answers that an earlier process has written, by row; -1 holds what was asked. The file is made, or repaired.

    Raises UserError where it was asked for something else, or a line is damaged.
    """
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []  # the last one has no end
    head, remedy, found = {"asked": asked}, "Remove it, or give another --out.", {}
    for number, line in enumerate(lines, 1):
        try:
            content = parse_json(line, allow_nan=True)
        except ValueError as error:
            raise UserError(f"{part} line {number} is {error}", remedy) from None
        if number == 1:
            if content != head:
                raise UserError(f"{part} holds answers to other prompts, or other settings.", remedy)
        elif isinstance(content.get("number"), int) and isinstance(content.get("row"), dict):
            found[content["number"]] = content["row"]
        else:
            raise UserError(f"{part} line {number} holds no answer.", remedy)
    with atomic_write(part) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines or [json.dumps(head).encode()]))
    return {-1: head, **found}


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
        "--context", type=int, default=4096, metavar="N", help="most tokens of a prompt and its answer (default: 4096)"
    )
    parser.add_argument(
        "--slots", type=int, metavar="N", help="answers that llama.cpp makes at once from a GGUF (default: 4)"
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

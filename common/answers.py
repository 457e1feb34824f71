"""`generate RUN`: an answer to every prompt of a file, as rows in the training format."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.data import Example
from common.errors import UserError
from common.files import SUFFIXES, read_places
from common.formats import NAMES, read_row
from common.progress import Display
from common.sampling import Sampling
from common.seam import Backend, Progress
from common.sources import SHOWN_FAULTS
from common.talk import system_text
from common.trained_voice import Voice
from common.turns import Empty, Fault
from common.voices import Kind, Target, choose, opened


def read_prompts(path: Path, system: str | None = None) -> list[Example]:
    """A prompt a row: its turns up to the last user's (or tool's); of a .txt file, a prompt a line.

    Rows may come in every shape that training reads, with their answers or without. `system` goes before those
    that have no system turn. Raises UserError naming the file and its faulty rows.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file.", f"Give one that ends in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {path} is not UTF-8 text (byte {error.start}).", "Convert it.") from None
        found = [
            Example(({"role": "user", "content": line},), f"{path.name}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        found, faults = [], []
        for place, source, row in read_places(path):
            try:
                if isinstance(row, Fault):
                    raise row
                found.append(_prompt(row, source))
            except Fault as fault:
                faults.append(f"{place}: {fault}")
        if faults:
            more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
            raise UserError(
                f"--prompts {path} has {len(faults)} bad rows:\n" + "\n".join([*faults[:SHOWN_FAULTS], *more]),
                'Correct them; a row: {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}',
            )
    if not found:
        raise UserError(f"--prompts {path} is empty: it holds no prompts.", "Put a prompt on each line.")
    head = ({"role": "system", "content": system},) if system else ()
    return [
        Example((head if row.messages[0]["role"] != "system" else ()) + row.messages, row.source, row.tools)
        for row in found
    ]


def _prompt(row: Any, source: str) -> Example:
    """Raises Fault where nothing is asked."""
    try:
        example = read_row(row, source, {})[1]
    except Fault as fault:
        try:  # a prompt alone: a row is read with an answer
            example = read_row(_answered(row), source, {})[1]
        except Fault:
            raise (Fault("asks nothing") if isinstance(fault, Empty) else fault) from None
    messages = list(example.messages) or [{"role": "user", "content": str(example.text)}]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise Fault("has no user turn")
    return Example(tuple(messages), source, example.tools)


def _answered(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    for name in (*NAMES["messages"], *NAMES["conversations"]):
        if isinstance(row.get(name), list):
            return row | {name: [*row[name], {"role": "assistant", "content": "?"}]}
    return row | {"completion": "?"} if any(row.get(name) for name in NAMES["prompt"]) else row


def generate(
    run: Path,
    prompts: Path,
    out: Path,
    kind: Kind | None,
    quant: str | None,
    system: str | None,
    system_file: Path | None,
    context: int,
    slots: int,
    llama_cpp: str | None,
    sampling: Sampling,
    make_backend: Callable[[str], Backend],
    display: Display,
) -> None:
    """Write `out`, whole or not at all. A stopped job goes on from `out`.part when the same is asked again.

    slots: answers that llama.cpp writes at once. Raises UserError before anything is loaded where something is missing.
    """
    sampling.check()
    if slots < 1:
        raise UserError(f"--slots {slots}: must be 1 or more.", "Leave it out.")
    target, rows = choose(run, kind, quant), read_prompts(prompts, system_text(system, system_file))
    if out.exists():
        raise UserError(f"--out {out} is there already.", "Give another name, or take it away.")
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UserError(f"--out {out}: rows are written as JSONL.", "Give a name that ends in .jsonl")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: its folder is not there, or may not be written.", "Make the folder first.")
    if target.kind != "gguf":
        slots = 1
    part = out.with_name(f"{out.name}.part")
    done = _begun(part, _asked_for(target, rows, sampling, context))
    if len(done) > 1:
        display.say(f"{part}: {len(done) - 1} of {len(rows)} answers are there already")
    left = [number for number in range(len(rows)) if number not in done]
    if left:
        with (
            opened(target, context, llama_cpp, make_backend, display, slots, _FLAGS) as voices,
            display.stage("answers") as progress,
            part.open("a", encoding="utf-8") as file,
        ):

            def keep(number: int, row: dict[str, Any]) -> None:
                done[number] = row
                file.write(json.dumps({"number": number, "row": row}, ensure_ascii=False) + "\n")
                file.flush()

            _ask_all(voices.tuned, rows, left, sampling, slots, keep, progress)
    lines = [json.dumps(done[number], ensure_ascii=False) + "\n" for number in range(len(rows))]
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(out)
    part.unlink()
    cut = sum(done[number]["finish"] == "length" for number in range(len(rows)))
    display.say(f"{len(rows)} answers in {out}" + (f"; {cut} were cut at --max-tokens or --context" if cut else ""))


_FLAGS = ("--reasoning-format", "none", "--skip-chat-parsing")  # a tool call is kept as the model wrote it


def _ask_all(
    voice: Voice,
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
        with closing(voice.answer(row.messages, sampling.for_row(number), row.tools)) as pieces:
            for piece, end in pieces:
                text, finish = text + piece, end
        whole = {"messages": [*row.messages, {"role": "assistant", "content": text}], "finish": finish}
        return whole | ({"tools": list(row.tools)} if row.tools else {})

    if slots == 1:  # in this thread: a backend's framework wants no other
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


def _asked_for(target: Target, rows: list[Example], sampling: Sampling, context: int) -> str:
    """A hash of all that makes the answers: a part of other ones is no beginning of these."""
    file = target.path if target.kind == "gguf" else target.run / "run.json"
    model = [target.kind, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
    asked = [model, asdict(sampling), context, [[row.messages, row.tools] for row in rows]]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def _begun(part: Path, asked: str) -> dict[int, dict[str, Any]]:
    """The answers that an earlier process has written, by row; -1 holds what was asked. The file is made or mended.

    Raises UserError where it was asked for something else.
    """
    lines = part.read_text(encoding="utf-8").split("\n") if part.exists() else []
    whole = lines[:-1]  # the last one has no end
    if whole and json.loads(whole[0]).get("asked") != asked:
        raise UserError(
            f"{part} holds answers to other prompts, or other settings.", "Take it away, or give another --out."
        )
    head = {"asked": asked}
    found = {line["number"]: line["row"] for line in map(json.loads, whole[1:])}
    temporary = part.with_name(f"{part.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in (whole or [json.dumps(head)])), encoding="utf-8")
    temporary.replace(part)
    return {-1: head, **found}

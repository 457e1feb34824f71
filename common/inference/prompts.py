"""Prompts for a model: a system prompt, and rows of a file."""

from pathlib import Path
from typing import Any

from common.data.dataset import Example
from common.data.formats import ALPACA, NAMES, by_name, read_row
from common.data.load import SHOWN_FAULTS
from common.data.messages import Empty, Fault
from common.data.other_training import OTHER_TRAINING
from common.data.readers import file_source
from common.data.row_source import not_utf8
from common.errors import UserError
from common.paths import SUFFIXES, user_path


def read_prompts(path: Path, system: str | None = None) -> list[Example]:
    """A prompt for each row: its turns up to the last user's (or tool's); of a .txt file, for each line.

    Rows may have any format that training reads, with answers or without. `system` goes before rows that have no
    system turn. Raises UserError naming the file and its faulty rows.
    """
    if not path.is_file():
        raise UserError(f"--prompts {path}: no such file.", f"Give one that ends in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # as splitlines, but not at form feeds or U+2028
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        found = [
            Example(({"role": "user", "content": line},), f"{path.name}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        found, faults = [], []
        source = file_source(path)
        for number, row in source.parsed():
            try:
                if isinstance(row, Fault):
                    raise row
                found.append(prompt_of_row(row, f"{source.name}:{number}"))
            except Fault as fault:
                faults.append(f"{source.place(number)}: {fault}")
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


def prompt_of_row(row: Any, source: str, fields: dict[str, str] | None = None) -> Example:
    """The prompt of a row, trained or not. fields: as --field says. Raises Fault where it has none."""
    fields = fields or {}
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if name not in ("train", "weight", *OTHER_TRAINING)}
    try:
        example = read_row(row, source, fields)[1]
    except Fault as fault:
        try:  # a prompt alone: a row is read with an answer
            example = read_row(_answered(row, fields), source, fields)[1]
        except Fault:
            raise (Fault("asks nothing") if isinstance(fault, Empty) else fault) from None
    messages = list(example.messages) or [{"role": "user", "content": str(example.text)}]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise Fault("has no user turn")
    return Example(tuple(messages), source, example.tools)


def _answered(row: Any, fields: dict[str, str]) -> Any:
    if not isinstance(row, dict):
        return row

    fields, columns = {ALPACA.get(part, part): column for part, column in fields.items()}, by_name(row)

    def names(part: str) -> list[str]:
        return [fields[part]] if part in fields else [columns.get(name, name) for name in NAMES[part]]

    for name in (*names("messages"), *names("conversations")):
        if isinstance(row.get(name), list):
            return row | {name: [*row[name], {"role": "assistant", "content": "?"}]}
    return row | {names("completion")[0]: "?"} if any(row.get(name) for name in names("prompt")) else row


def system_text(system: str | None, file: Path | None = None) -> str | None:
    """The system prompt of --system TEXT or @FILE, or --system-file FILE. Raises UserError for both or no file."""
    if system and file:
        raise UserError("--system and --system-file are both given.", "Leave one of them out.")
    path = file or (user_path(system[1:], "--system") if system and system.startswith("@") else None)
    if path is None:
        return system or None
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The system prompt's file {path} cannot be read: {error}", "Give a UTF-8 text file.") from None

"""JSONL chat rows -> Example; one file with a seeded hold-out, or a folder with train, valid and test."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

ROLES = ("system", "user", "assistant")
SHOWN_FAULTS = 10
FORM = 'each line: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Example:
    """A conversation, or plain text (then `messages` is empty).

    A message has `role` and `content`, and may have `reasoning_content`, `tool_calls` (arguments parsed),
    `tool_call_id`, `name`, and `train: False` where its tokens carry no loss.
    `tools` are JSON schemas for the template.
    """

    messages: tuple[dict[str, Any], ...]
    source: str  # "train.jsonl:17"
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Data:
    train: list[Example]
    valid: list[Example]
    test: list[Example]


def load_data(path: Path, valid_share: float, seed: int) -> Data:
    """Read a JSONL file (holding out `valid_share` of its rows) or a folder with train.jsonl and, if any, the others.

    Raises UserError naming the file and every faulty line.
    """
    if path.is_dir():
        train = path / "train.jsonl"
        if not train.exists():
            raise UserError(
                f"--data {path}: there is no train.jsonl in this folder.",
                "Name the training file train.jsonl (valid.jsonl and test.jsonl beside it are optional), "
                "or give one JSONL file.",
            )
        others = [path / "valid.jsonl", path / "test.jsonl"]
        valid, test = (read_rows(other) if other.exists() else [] for other in others)
        return Data(read_rows(train), valid, test)
    rows = read_rows(path)
    count = min(len(rows) - 1, max(1, round(len(rows) * valid_share))) if valid_share else 0
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(rows))[:count].tolist())
    return Data(
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
        [],
    )


def read_rows(path: Path) -> list[Example]:
    """Every row of a JSONL file. Raises UserError naming the file and up to ten faulty lines."""
    text = _read_text(path)
    rows: list[Example] = []
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        found = _read_row(line)
        if isinstance(found, str):
            faults.append(f"{path.name} line {number}: {found}")
        else:
            rows.append(Example(found, f"{path.name}:{number}"))
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = faults[:SHOWN_FAULTS] + ([f"... and {more} more lines"] if more > 0 else [])
        raise UserError(f"{path} has {len(faults)} bad line(s):\n" + "\n".join(shown), f"Correct them; {FORM}")
    if not rows:
        raise UserError(f"{path} is empty: it holds no rows.", f"Put rows in it; {FORM}")
    return rows


def prompt_of(row: Example) -> list[dict[str, str]]:
    """The turns before the row's last assistant turn."""
    if row.text is not None:
        return []
    last = max(turn for turn, message in enumerate(row.messages) if message["role"] == "assistant")
    return [dict(message) for message in row.messages[:last]]


def data_hash(data: Data) -> str:
    """SHA-256 over the contents of training and validation rows in order; names and formatting do not enter."""
    digest = hashlib.sha256()
    for part in (data.train, data.valid):
        for row in part:
            digest.update(json.dumps(row.messages, sort_keys=True, ensure_ascii=False).encode())
            digest.update(b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"--data {path}: no such file or folder.", f"Give a JSONL file; {FORM}") from None
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}.", "Check the path and its rights.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(raw)
        raise UserError(
            f"{path} is not UTF-8 text (line {line}, byte {error.start}){f'; it looks like {guess}' if guess else ''}.",
            f"Convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {path.name} > utf8.jsonl",
        ) from None


def _guess_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    for codec, name in (("euc_jp", "EUC-JP"), ("cp932", "SHIFT_JIS"), ("gb18030", "GB18030")):
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError:
            continue
        # nearly every byte string is something in these: believe it only where there is kana
        if any("\u3040" <= letter <= "\u30ff" for letter in text):
            return name
    return None


def _read_row(line: str) -> tuple[dict[str, str], ...] | str:
    """The row's messages, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        return f"is not JSON{where}"
    if not isinstance(row, dict) or "messages" not in row:
        keys = f" (its keys: {', '.join(map(str, row))})" if isinstance(row, dict) else ""
        return f"has no `messages`{keys}"
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list of turns"
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return f"turn {turn} has no text in `content`"
        if message.get("role") not in ROLES:
            return f"turn {turn} has the role {message.get('role')!r}; known: {', '.join(ROLES)}"
        if message["role"] == "system" and turn > 1:
            return f"turn {turn} is a system turn; it can only be the first"
        if any("\ud800" <= letter <= "\udfff" for letter in message["content"]):
            return f"turn {turn} holds half a character (a lone surrogate such as \\ud83d)"
        if message["role"] == "assistant" and not message["content"].strip():
            return f"turn {turn}: the assistant's turn is empty, so there is nothing to learn"
    if not any(message["role"] == "assistant" for message in messages):
        return "has no assistant turn, so there is nothing to learn"
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)

"""The rows of a test file: what is asked, the answer that is expected, and the tokens whose loss is taken."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data.chat_template import OPEN_BLOCK
from common.data.dataset import Example, prompt_key
from common.data.encode import Encoded, Encoder
from common.data.formats import read_row
from common.data.load import SHOWN_FAULTS
from common.data.message_forms import after_reasoning, reasoning_is_open
from common.data.messages import Fault
from common.data.readers import file_source
from common.data.turn_edges import BadRow
from common.errors import UserError
from common.inference.backend_chat import without_hidden
from common.inference.prompts import prompt_of_row
from common.paths import SUFFIXES


@dataclass(frozen=True)
class JudgedRow:
    """A row of the test file. Of a conversation the last assistant turn is judged, given all before it."""

    source: str  # "test.jsonl:7"
    raw: Any  # as its file has it
    prompt: Example | None  # None: plain text
    reference: str | None = None  # what the last turn should be; None where the row does not end with an answer
    encoded: Encoded | None = None  # with the labels of training; None where there are none


def read_test(
    path: Path, encoder: Encoder | None, limit: int | None, fields: dict[str, str] | None = None
) -> list[JudgedRow]:
    """The first `limit` rows of the file, or all. Raises UserError naming the file and its faulty rows.

    encoder: as in training; without one no row has tokens. fields: as --field says.
    """
    if not path.is_file():
        raise UserError(f"--data {path}: no such file.", f"Give one that ends in {', '.join(SUFFIXES)}.")
    source, found, faults = file_source(path), list[JudgedRow](), list[str]()
    shown = without_hidden(encoder.tokenizer) if encoder else str
    for number, raw in source.parsed():
        if limit is not None and len(found) + len(faults) >= limit:
            break
        try:
            found.append(_judged(raw, f"{source.name}:{number}", encoder, shown, fields or {}))
        except Fault as fault:
            faults.append(f"{source.place(number)}: {fault}")
        except BadRow as bad:
            faults.append(bad.what)
    if faults:
        more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise UserError(
            f"--data {path} has {len(faults)} bad rows:\n" + "\n".join([*faults[:SHOWN_FAULTS], *more]),
            'Correct them; a row: {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}',
        )
    if not found:
        raise UserError(f"--data {path} is empty: it holds no rows.", "Put a row on each line.")
    return found


def _judged(
    raw: Any, source: str, encoder: Encoder | None, shown: Callable[[str], str], fields: dict[str, str]
) -> JudgedRow:
    """Raises Fault, or BadRow where it cannot be rendered or labeled exactly."""
    if isinstance(raw, Fault):
        raise raw
    try:
        example = read_row(raw, source, fields)[1]
    except Fault:  # without an answer, or one that is not trained
        asked = prompt_of_row(raw, source, fields)
        return JudgedRow(source, raw, (encoder.without_tools(asked) if encoder else None) or asked)
    encoded = None
    if example.text is None and encoder is not None:
        encoded, conversation, example = encoder.encode_chat(example)
        turn = conversation.turns[-1]
        opened = OPEN_BLOCK.search(conversation.text[: turn.start])  # an answer begins with it
        text = (opened[1] if opened else "") + conversation.text[turn.start : turn.stop]
    elif encoder is not None:
        encoded = encoder(example)
    if encoded is not None and not encoded.label_tokens:
        encoded = None
    if example.text is not None:
        return JudgedRow(source, raw, None, encoded=encoded)
    last, prompt = example.messages[-1], _prompt_of(example)
    if last["role"] != "assistant":
        return JudgedRow(source, raw, prompt, encoded=encoded)
    if encoder is not None:  # expected as the chat template writes it: a call, or the name of a channel before the text
        return JudgedRow(source, raw, prompt, shown(said(text)), encoded)
    return JudgedRow(source, raw, prompt, None if last.get("tool_calls") else said(last["content"]), encoded)


def learned_rows(rows: Sequence[JudgedRow], trained: Iterable[Example]) -> list[str]:
    """The sources of the rows whose prompt is that of one of the conversations in `trained`."""
    keys = {prompt_key(example) for example in trained}
    asked = [(row.source, row.prompt) for row in rows if row.prompt is not None]
    answer = {"role": "assistant"}  # which the key leaves out
    return [source for source, row in asked if prompt_key(replace(row, messages=(*row.messages, answer))) in keys]


def _prompt_of(example: Example) -> Example:
    messages = list(example.messages)
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    if not messages:
        raise Fault("has no user turn")
    return replace(example, messages=tuple(messages))


def said(answer: str) -> str:
    """What an answer says after its reasoning; nothing where it ends within that."""
    return "" if reasoning_is_open(answer) else after_reasoning(answer)

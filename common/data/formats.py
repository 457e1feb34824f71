"""The formats that rows come in, recognized by their columns: each row becomes an Example, or a Fault says why not."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.data.dataset import Example
from common.data.messages import (
    TURN_KEYS,
    Empty,
    Fault,
    Row,
    Untrained,
    check_characters,
    conversation,
    loss_weight,
    message_of,
    parsed,
    read_tool,
    read_turns,
)
from common.data.other_training import other_training

# What a format's part may be called, in capitals or not; `--field PART=COLUMN` says it where it is called otherwise.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query", "problem", "質問", "指示"),
    "input": ("input", "context", "入力"),
    "completion": ("completion", "output", "response", "answer", "solution", "回答", "応答", "出力"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "text": ("text",),
    "tools": ("tools",),
}
ALPACA = {"instruction": "prompt", "output": "completion"}  # two names for one part
PARTS = (*NAMES, *ALPACA)
# Parts that only one format has: naming one of them in --field determines the format.
_FORMAT_OF = {"messages": "messages", "conversations": "conversations", "text": "text"} | dict.fromkeys(
    ("prompt", "input", "completion", "history"), "pair"
)
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_NOTHING: tuple[Any, ...] = (None, "", [], {})
KNOWN = "messages, ShareGPT's conversations, Alpaca's instruction and output, prompt and completion, or text"


def by_name(row: Row) -> dict[str, str]:
    """{a name as in NAMES: the column}. Where only capitals tell columns apart, the one written as the name is."""
    return {str(column).casefold(): column for column in row} | {column: column for column in row}


@dataclass(frozen=True)
class _Columns:
    """A row, and which of its columns hold which part. fields: {part: its column}, as --field says."""

    row: Row
    fields: dict[str, str]

    def name(self, part: str) -> str | None:
        """The column that holds the part: what --field says, else one of its usual names. Filled ones come first."""
        if part in self.fields:
            return self.fields[part] if self.fields[part] in self.row else None
        there = [self.named[name] for name in NAMES[part] if name in self.named]
        there = [name for name in there if name not in self.fields.values()]
        if not there:
            return None
        filled = [name for name in there if self.row[name] not in _NOTHING]
        if len(filled) > 1:
            raise Fault(f"has `{filled[0]}` and `{filled[1]}`: choose one with --field {part}={filled[0]}")
        if filled:
            return filled[0]
        empty_is_a_fault = part in ("prompt", "completion", "text")  # of the row; other columns may be left empty
        return there[0] if empty_is_a_fault else None

    def value(self, part: str) -> Any:
        return None if (name := self.name(part)) is None else self.row[name]

    def unread(self, used: list[str | None]) -> list[str]:
        """The filled columns but those, and keys of their turns that nothing reads, such as `messages[].loss`."""
        known = {*used, "train", "weight"} if self.chat else {*used}
        columns = [str(name) for name, value in self.row.items() if name not in known and value not in _NOTHING]
        lists = {name for name in used if name and isinstance(self.row[name], list)} - {self.name("tools")}
        turns = [(name, turn) for name in lists for turn in self.row[name] if isinstance(turn, dict)]
        others = [(name, key, turn[key]) for name, turn in turns for key in turn if key not in TURN_KEYS]
        return [*columns, *sorted({f"{name}[].{key}" for name, key, value in others if value not in _NOTHING})]

    @cached_property
    def named(self) -> dict[str, str]:
        return by_name(self.row)

    @cached_property
    def chat(self) -> list[tuple[str, str]]:
        """`(format, column)` of each list of turns that the row may be read by."""
        named = [(format, self.name(format)) for format in ("messages", "conversations") if self.may_be(format)]
        return [(format, name) for format, name in named if name]

    def may_be(self, format: str) -> bool:
        """Whether --field leaves room for the format."""
        if not self.fields:
            return True
        wanted = {_FORMAT_OF[part] for part in self.fields if part in _FORMAT_OF}
        return not wanted or format in wanted


def read_row(row: Any, source: str, fields: dict[str, str]) -> tuple[str, Example, list[str]]:
    """`(name of its format, example, filled columns that are not read)`; `fields`: {part: its column}.

    Raises Fault, and LeftOut where nothing is trained. A conversation comes before a pair beside it, and a pair before
    `text`: data sets that hold several forms of the same row mean it so. Two columns for one part are never chosen
    between.
    """
    if not isinstance(row, dict):
        raise Fault("is not an object with named fields")
    if not fields and (media := [name for name in _MEDIA if row.get(name) not in _NOTHING]):
        raise Fault(f"has `{media[0]}`, and only text is trained")
    columns = _Columns(row, {ALPACA.get(part, part): column for part, column in fields.items()})
    weight = loss_weight(row, "") if columns.chat else 1.0  # elsewhere a `weight` may be a product's
    if not weight:
        raise Untrained("has train: false or weight: 0")
    if other := other_training(row, columns.fields):
        raise Fault(other)
    tools = tuple(read_tool(tool) for tool in parsed(columns.value("tools"), "tools", list) or ())
    head = [message_of("system", text, 0)] if (text := columns.value("system")) not in _NOTHING else []
    if found := _read_chat(columns) or _read_pair(columns):
        format, turns, used = found
        used += [columns.name("system"), columns.name("tools")]
        return format, conversation(head, turns, source, tools, weight), columns.unread(used)
    if columns.may_be("text") and (name := columns.name("text")):
        return "plain text", Example((), source, text=_read_text(row, name)), columns.unread([name])
    named = [columns.named[name] for part in _FORMAT_OF for name in NAMES[part] if name in columns.named]
    if bare := [name for name in named if row[name] in _NOTHING]:
        raise Fault(f"`{bare[0]}` is empty")
    raise Fault(f"has none of {KNOWN} (its keys: {', '.join(map(str, row)) or 'none'})")


_Found = tuple[str, list[Row], list[str | None]]  # the format, its turns, the columns that they are from


def _read_chat(columns: _Columns) -> _Found | None:
    found = columns.chat
    if len(found) > 1:
        raise Fault(f"has `{found[0][1]}` and `{found[1][1]}`: choose one with --field messages={found[0][1]}")
    if not found:
        return None
    format, name = found[0]
    return "messages" if format == "messages" else "ShareGPT", read_turns(columns.row[name], name), [name]


def _read_pair(columns: _Columns) -> _Found | None:
    if not columns.may_be("pair"):
        return None
    row, (prompt, extra, answer) = columns.row, map(columns.name, ("prompt", "input", "completion"))
    if prompt is None or (isinstance(row[prompt], str) and not row[prompt].strip() and extra):
        prompt, extra = extra, None
    if extra and not str(row[extra] or "").strip():
        extra = None
    if not prompt or not answer:
        return None
    format = "Alpaca" if prompt == "instruction" or columns.name("history") else "prompt and completion"
    used = [prompt, *([extra] if extra else []), answer]
    if not {*used} <= {"instruction", "input", "output", "prompt", "completion"}:
        format += f" ({', '.join(used)})"
    turns = _history(columns.value("history")) + _pair(row, prompt, extra, answer)
    return format, turns, [*used, columns.name("history")]


def _read_text(row: Row, name: str) -> str:
    text = row[name]
    if not isinstance(text, str):
        raise Fault(f"`{name}` is not a text")
    if not text.strip():
        raise Empty(f"`{name}` is empty")
    check_characters(text, f"`{name}`")
    return text


def clashing(fields: dict[str, str]) -> str | None:
    """How --field contradicts itself; None where it does not."""
    for alias, part in ALPACA.items():
        if alias in fields and part in fields:
            return f"{alias} and {part} are the same part"
    formats = {_FORMAT_OF[name]: part for part in fields if (name := ALPACA.get(part, part)) in _FORMAT_OF}
    return f"{' and '.join(formats.values())} belong to different formats" if len(formats) > 1 else None


def _history(value: Any) -> list[Row]:
    turns = []
    for number, pair in enumerate(parsed(value, "history", list) or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"`history` {number} is not a pair of question and answer")
        turns += [message_of("user", pair[0], number), message_of("assistant", pair[1], number)]
    return turns


def _pair(row: Row, prompt: str, extra: str | None, answer: str) -> list[Row]:
    """The turns of prompt and answer, each a text or a list of turns; those of the prompt are not trained."""
    if isinstance(row[prompt], list):
        if extra:
            raise Fault(f"`{prompt}` is a list of turns, so `{extra}` cannot be added to it")
        given = read_turns(row[prompt], prompt)
        turns = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in given]
    else:
        text = _text(row[prompt], prompt)
        turns = [message_of("user", f"{text}\n\n{_text(row[extra], extra)}" if extra else text, 1)]
    if isinstance(row[answer], list) and row[answer]:
        return turns + read_turns(row[answer], answer)
    if row[answer] in _NOTHING:
        raise Empty(f"`{answer}` is empty")
    return [*turns, message_of("assistant", _text(row[answer], answer), len(turns) + 1)]


def _text(value: Any, column: str) -> str:
    """The value as text. An integer is written in one way only; how a fraction or a date was written is lost."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Fault(f"`{column}` is not a text")
    return value

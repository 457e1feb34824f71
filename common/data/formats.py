"""The shapes that rows come in, told apart by looking: each becomes an Example, or words for what is wrong with it."""

from typing import Any

from common.data.dataset import Example
from common.data.messages import (
    Empty,
    Fault,
    Row,
    conversation,
    message_of,
    parsed,
    read_tool,
    read_turns,
    whole_letters,
)

# What a shape's part may be called; `--field PART=COLUMN` says it where it is called otherwise.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "query", "problem"),
    "input": ("input", "context"),
    "completion": ("completion", "output", "response", "answer", "solution"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "text": ("text",),
    "tools": ("tools",),
}
_ALPACA = {"instruction": "prompt", "output": "completion"}  # two names for one part
PARTS = (*NAMES, *_ALPACA)
# Parts that only one shape has: naming one of them in --field settles the shape.
_SHAPE_OF = {"messages": "messages", "conversations": "conversations", "text": "text"} | dict.fromkeys(
    ("prompt", "input", "completion", "history"), "pair"
)
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_NOTHING: tuple[Any, ...] = (None, "", [], {})
KNOWN = "messages, ShareGPT's conversations, Alpaca's instruction and output, prompt and completion, or text"


def read_row(row: Any, source: str, fields: dict[str, str]) -> tuple[str, Example]:
    """`(shape, example)`; `fields`: {part: its column}. Raises Fault, and Empty for an answer without words.

    A whole conversation comes before a pair beside it, and a pair before `text`: that is how data sets that hold
    several forms of the same row mean it. Two columns for one part are never chosen between.
    """
    if not isinstance(row, dict):
        raise Fault("is no object with named fields")
    fields = {_ALPACA.get(part, part): column for part, column in fields.items()}
    wanted = {_SHAPE_OF[part] for part in fields if part in _SHAPE_OF}
    if not fields and (media := [name for name in _MEDIA if row.get(name) not in _NOTHING]):
        raise Fault(f"has `{media[0]}`, and only text is trained")

    def column(part: str) -> str | None:
        return _column(row, part, fields)

    def get(part: str) -> Any:
        return None if (name := column(part)) is None else row[name]

    def may_be(shape: str) -> bool:
        return not wanted or shape in wanted

    tools = tuple(read_tool(tool) for tool in parsed(get("tools"), "tools", list) or ())
    head = [message_of("system", text, 0)] if (text := get("system")) not in _NOTHING else []
    chats = [(shape, name) for shape in ("messages", "conversations") if may_be(shape) and (name := column(shape))]
    if len(chats) > 1:
        raise Fault(f"has `{chats[0][1]}` and `{chats[1][1]}`: choose one with --field messages={chats[0][1]}")
    if chats:
        shape, name = chats[0]
        turns = read_turns(row[name], name)
        return ("messages" if shape == "messages" else "ShareGPT"), conversation(head, turns, source, tools)
    if may_be("pair"):
        asked, further, answered = column("prompt"), column("input"), column("completion")
        if asked is None or (isinstance(row[asked], str) and not row[asked].strip() and further):
            asked, further = further, None
        if further and not str(row[further] or "").strip():
            further = None
        if asked and answered:
            shape = "Alpaca" if asked == "instruction" or column("history") else "prompt and completion"
            used = [name for name in (asked, further, answered) if name]
            if not {*used} <= {"instruction", "input", "output", "prompt", "completion"}:
                shape += f" ({', '.join(used)})"
            turns = _history(get("history")) + _pair(row, asked, further, answered)
            return shape, conversation(head, turns, source, tools)
    if may_be("text") and (name := column("text")):
        if not isinstance(text := row[name], str):
            raise Fault(f"`{name}` is no text")
        if not text.strip():
            raise Empty(f"`{name}` is empty")
        whole_letters(text, f"`{name}`")
        return "plain text", Example((), source, text=text)
    if {"chosen", "rejected"} <= row.keys():
        part = "messages" if isinstance(row["chosen"], list) else "completion"
        raise Fault(f"holds a chosen and a rejected answer; to train on the chosen one: --field {part}=chosen")
    if bare := [name for part in _SHAPE_OF for name in NAMES[part] if name in row and row[name] in _NOTHING]:
        raise Fault(f"`{bare[0]}` is empty")
    raise Fault(f"has none of {KNOWN} (its keys: {', '.join(map(str, row)) or 'none'})")


def clashing(fields: dict[str, str]) -> str | None:
    """How --field contradicts itself, if it does."""
    for alias, part in _ALPACA.items():
        if alias in fields and part in fields:
            return f"{alias} and {part} are the same part"
    shapes = {_SHAPE_OF[name]: part for part in fields if (name := _ALPACA.get(part, part)) in _SHAPE_OF}
    return f"{' and '.join(shapes.values())} belong to different shapes" if len(shapes) > 1 else None


def _column(row: Row, part: str, fields: dict[str, str]) -> str | None:
    """The column that holds a part: what --field says, else what is called so. Empty ones yield to filled ones."""
    if part in fields:
        return fields[part] if fields[part] in row else None
    there = [name for name in NAMES[part] if name in row and name not in fields.values()]
    filled = [name for name in there if row[name] not in _NOTHING]
    if len(filled) > 1:
        raise Fault(f"has `{filled[0]}` and `{filled[1]}`: choose one with --field {part}={filled[0]}")
    empty_is_said = part in ("prompt", "completion", "text")  # a fault of the row, not a lack of the column
    return filled[0] if filled else there[0] if there and empty_is_said else None


def _history(value: Any) -> list[Row]:
    turns = []
    for number, pair in enumerate(parsed(value, "history", list) or [], 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"`history` {number} is no pair of question and answer")
        turns += [message_of("user", pair[0], number), message_of("assistant", pair[1], number)]
    return turns


def _pair(row: Row, asked: str, further: str | None, answered: str) -> list[Row]:
    """Texts become a turn each; lists of turns are joined, those of the prompt without loss."""
    if isinstance(row[asked], list):
        if further:
            raise Fault(f"`{asked}` is a list of turns, so `{further}` cannot be added to it")
        said = [
            turn | {"train": False} if turn["role"] == "assistant" else turn for turn in read_turns(row[asked], asked)
        ]
    else:
        text = _text(row[asked], asked)
        said = [message_of("user", f"{text}\n\n{_text(row[further], further)}" if further else text, 1)]
    if isinstance(row[answered], list) and row[answered]:
        return said + read_turns(row[answered], answered)
    if row[answered] in _NOTHING:
        raise Empty(f"`{answered}` is empty")
    return [*said, message_of("assistant", _text(row[answered], answered), len(said) + 1)]


def _text(value: Any, column: str) -> str:
    """A whole number is written one way only; how a fraction or a date was written is lost."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Fault(f"`{column}` is no text")
    return value

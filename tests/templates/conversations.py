"""The conversations that each template is tried on, each with a trap for whoever looks for the answer's text."""

from typing import Any

from common.data.dataset import Example


def _row(name: str, *turns: tuple[str, str], **fields: Any) -> Example:
    return Example(tuple({"role": role, "content": content} for role, content in turns), name, **fields)


_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Kyoto"}}}
_QUESTIONS = (("user", "What is two plus two?"), ("user", "And who wrote it down first?"), ("user", "Thank you!"))
_ANSWERS = (
    ("assistant", "Four, as everyone knows."),
    ("assistant", "Nobody remembers that.\n\n- It was long ago.\n- It was far away."),
    ("assistant", "You are welcome: ask again."),
)
_MULTI = tuple(turn for pair in zip(_QUESTIONS, _ANSWERS, strict=True) for turn in pair)
_SYSTEM = ("system", "Speak as a harbour parrot would.")
_THOUGHTS = ("The sum of two twos is wanted.", "Records are missing here.")


def _reasoning() -> Example:
    turns = [{"role": role, "content": content} for role, content in _MULTI[:4]]
    for turn, thought in zip((1, 3), _THOUGHTS, strict=True):
        turns[turn]["reasoning_content"] = thought
    return Example(tuple(turns), "reasoning")


def _thinking() -> Example:
    turns = [{"role": role, "content": content} for role, content in _MULTI[:4]]
    for turn, thought in zip((1, 3), _THOUGHTS, strict=True):
        turns[turn]["content"] = f"<think>\n{thought}\n</think>\n\n{turns[turn]['content']}"
    return Example(tuple(turns), "think text")


def _tools() -> Example:
    return Example(
        (
            {"role": "user", "content": "Is it raining there?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"sky": "heavy clouds"}'},
            {"role": "assistant", "content": "Not yet, but soon."},
        ),
        "tools",
        (_WEATHER,),
    )


CONVERSATIONS = (
    _row("single", *_MULTI[:2]),
    _row("multi", *_MULTI),
    _row("system", _SYSTEM, *_MULTI[:4]),
    _row(
        "japanese",
        ("user", "京都の天気はどうですか？"),
        ("assistant", "晴れです。気温は25度、湿度は低めです😀"),
        ("user", "明日は？"),
        ("assistant", "雨になりそうです。傘をお持ちください。"),
    ),
    _reasoning(),
    _thinking(),
    _tools(),
    _row(
        "whitespace",
        ("user", "  Two lines, please.\n"),
        ("assistant", " \n  The first line.\n\n    The second one. \n\n"),
        ("user", "\n\nAnother "),
        ("assistant", "\n\nHere it is.\n"),
    ),
    _row(
        "repeats",
        ("user", "Say: yes, yes."),
        ("assistant", "yes, yes."),
        ("user", "yes, yes."),
        ("assistant", "yes, yes."),
        ("user", "assistant"),
        ("assistant", "user"),
    ),
    _row("letter", ("user", "The first letter, as a letter?"), ("assistant", "a"), ("user", "a"), ("assistant", "a")),
    _row("faint", ("user", " "), ("assistant", "You said nothing."), ("user", "."), ("assistant", "A full stop.")),
)
# For these the whole answer is known beforehand; in the others a template may write more than the content.
EXACT = {row.source for row in CONVERSATIONS} - {"reasoning", "think text", "tools"}
THOUGHTS = _THOUGHTS

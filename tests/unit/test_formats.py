"""The shapes of rows: each becomes the same conversation."""

from typing import Any

import pytest

from common.formats import Fault, read_row

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tokyo"}}}


def said(row: Any, **fields: str) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in read_row(row, "a:1", fields)[1].messages]


def fault(row: Any) -> str:
    with pytest.raises(Fault) as caught:
        read_row(row, "a:1", {})
    return str(caught.value)


CHAT = [("system", "Be"), ("user", "Hi"), ("assistant", "Yo")]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("messages", {"messages": [{"role": r, "content": c} for r, c in CHAT]}),
        ("messages", {"system": "Be", "messages": [{"role": r, "content": c} for r, c in CHAT[1:]]}),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "Be"}, *({"role": r, "content": c} for r, c in CHAT[1:])]},
        ),
        (
            "messages",
            {
                "messages": '[{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}, '
                '{"role": "assistant", "content": "Yo"}]'
            },
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": r, "value": c} for r, (_, c) in zip(("system", "human", "gpt"), CHAT, strict=True)
                ]
            },
        ),
        (
            "ShareGPT",
            {"system": "Be", "conversations": [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        ),
        ("Alpaca", {"instruction": "Hi", "input": "", "output": "Yo", "system": "Be"}),
        ("prompt and completion", {"system": "Be", "prompt": "Hi", "completion": "Yo"}),
        ("prompt and completion", {"system": "Be", "question": "Hi", "answer": "Yo"}),
        (
            "prompt and completion",
            {
                "prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}],
                "completion": [{"role": "assistant", "content": "Yo"}],
            },
        ),
    ],
)
def test_every_shape_is_the_same_conversation(shape: str, row: dict) -> None:
    assert read_row(row, "a:1", {})[0] == shape
    assert said(row) == CHAT


def test_alpacas_input_and_history() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Yo"]]}
    assert said(row) == [("user", "Hi"), ("assistant", "Yo"), ("user", "Add\n\n1 2"), ("assistant", "3")]


def test_plain_text() -> None:
    shape, example = read_row({"text": " Once "}, "a:1", {})
    assert (shape, example.text, example.messages) == ("plain text", " Once ", ())


def test_columns_called_otherwise() -> None:
    assert said({"q": "Hi", "a": "Yo", "who": "Be"}, prompt="q", completion="a", system="who") == CHAT


def test_parts_of_a_content_are_joined() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}
    row["messages"].append({"role": "assistant", "content": "Yo"})
    assert said(row) == CHAT[1:]


def test_thoughts_tools_and_turns_without_loss() -> None:
    row = {
        "tools": '[{"type": "function"}]',
        "messages": [
            {"role": "user", "content": "Hi", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **CALL}], "weight": 0},
            {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "x"},
            {"role": "assistant", "content": "Yo", "reasoning": "Hm", "weight": 1},
        ],
    }
    example = read_row(row, "a:1", {})[1]
    assert example.tools == ({"type": "function"},)
    assert example.messages == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "x"}], "train": False},
        {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "x"},
        {"role": "assistant", "content": "Yo", "reasoning_content": "Hm"},
    )


def test_arguments_as_json_and_sharegpts_function_calls() -> None:
    text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Tokyo"}'}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [text]}]}
    assert read_row(row, "a:1", {})[1].messages[0]["tool_calls"] == [CALL]
    value = '{"name": "weather", "arguments": {"city": "Tokyo"}}'
    row = {"conversations": [{"from": "function_call", "value": value}, {"from": "observation", "value": "sunny"}]}
    first, second = read_row(row, "a:1", {})[1].messages
    assert (first["role"], first["tool_calls"], second["role"]) == ("assistant", [CALL], "tool")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "is no object"),
        ({}, "has none of messages"),
        ({"messages": "[{"}, "`messages` is a text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 holds 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}]}, "without a function's name"),
        ({"messages": [{"role": "assistant", "content": "Yo", "weight": 0.5}]}, "`weight` can be 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "Yo", "train": False}]}, "no assistant turn that is trained"),
        ({"instruction": 3, "output": "Yo"}, "`instruction` is no text"),
        ({"instruction": "Hi", "output": " "}, "the assistant's turn is empty"),
        ({"text": " "}, "`text` is empty"),
        ({"text": "Yo \ud83d"}, "`text` holds half a character"),
        ({"prompt": "Hi", "completion": 3}, "turn 2 has no text"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_said(row: Any, words: str) -> None:
    assert words in fault(row)

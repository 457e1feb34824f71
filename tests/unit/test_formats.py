"""The shapes of rows: each becomes the same conversation."""

from typing import Any

import pytest

from common.data.formats import read_row
from common.data.messages import Empty, Fault

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
        ("prompt and completion (question, answer)", {"system_prompt": "Be", "question": "Hi", "answer": "Yo"}),
        ("prompt and completion", {"system": "Be", "input": "Hi", "output": "Yo"}),
        ("prompt and completion", {"system": "Be", "prompt": "Hi", "completion": "Yo", "text": "### Hi ### Yo"}),
        ("messages", {"messages": [{"role": r, "content": c} for r, c in CHAT], "prompt": "Hi", "images": []}),
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
    shape, example, _ = read_row({"text": " Once "}, "a:1", {})
    assert (shape, example.text, example.messages) == ("plain text", " Once ", ())


@pytest.mark.parametrize("given", [{"weight": 70.5}, {"weight": "12 kg"}, {"weight": 0, "train": "ICE"}])
@pytest.mark.parametrize(
    "row", [{"instruction": "Hi", "output": "Yo"}, {"prompt": "Hi", "completion": "Yo"}, {"text": "Hi"}]
)
def test_a_products_weight_is_no_loss_weight(row: dict, given: dict) -> None:
    _, example, unread = read_row(row | given, "a:1", {})
    assert (example.weight, unread) == (1, list(given))


def test_dollys_context_goes_to_the_question_and_whole_numbers_are_text() -> None:
    row = {"instruction": "Add", "context": "1 2", "response": 3}
    assert said(row) == [("user", "Add\n\n1 2"), ("assistant", "3")]
    assert read_row(row, "a:1", {})[0] == "Alpaca (instruction, context, response)"


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"質問": "Hi", "回答": "Yo"}, ["Hi", "Yo"]),
        ({"指示": "Hi", "入力": "there", "出力": "Yo"}, ["Hi\n\nthere", "Yo"]),
        ({"Question": "Hi", "ANSWER": "Yo"}, ["Hi", "Yo"]),
        ({"Prompt": "Ho", "prompt": "Hi", "Response": "Yo"}, ["Hi", "Yo"]),
    ],
)
def test_columns_of_a_spreadsheet_are_known_in_japanese_and_in_capitals(row: dict, turns: list[str]) -> None:
    format, example, _ = read_row(row, "a:1", {})
    assert [turn["content"] for turn in example.messages] == turns
    assert format == f"prompt and completion ({', '.join(name for name in row if name != 'Prompt')})"


def test_answers_in_a_list_of_the_prompt_carry_no_loss() -> None:
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    row = {"prompt": [*prompt, {"role": "user", "content": "So"}], "completion": "No"}
    turns = read_row(row, "a:1", {})[1].messages
    assert [m.get("train", True) for m in turns if m["role"] == "assistant"] == [False, True]


def test_field_settles_the_shape_and_the_column() -> None:
    row = {"messages": [1], "question": "Hi", "answer": "?", "solution": "Yo", "text": "?"}
    assert said(row, output="solution") == CHAT[1:]
    assert read_row(row, "a:1", {"text": "text"})[1].text == "?"


@pytest.mark.parametrize("answer", ["", " ", None])
def test_an_empty_answer_is_a_fault_of_its_own(answer: str | None) -> None:
    with pytest.raises(Empty):
        read_row({"instruction": "Hi", "output": answer}, "a:1", {})
    with pytest.raises(Empty):
        read_row({"messages": [{"role": "assistant", "content": answer or ""}]}, "a:1", {})


def test_an_empty_answer_without_loss_may_stay() -> None:
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "weight": 0}]
    row = {"messages": [*first, {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yo"}]}
    assert said(row)[1] == ("assistant", "")


def test_a_bare_function_is_wrapped_as_templates_expect() -> None:
    row = {"prompt": "Hi", "completion": "Yo", "tools": '[{"name": "weather", "parameters": {}}]'}
    schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert read_row(row, "a:1", {})[1].tools == (schema,)


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
        ([1], "is not an object"),
        ({}, "has none of messages"),
        ({"messages": "[{"}, "`messages` is a text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1 holds 'image_url'"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}]}, "without a function's name"),
        ({"messages": [{"role": "assistant", "content": "Yo", "weight": -0.5}]}, "`weight` can be 0, or a number"),
        ({"messages": [{"role": "assistant", "content": "Yo", "train": False}]}, "no assistant turn that is trained"),
        ({"messages": [{"role": ["user"], "content": "Yo"}]}, "turn 1 has the role ['user']"),
        ({"messages": "[" * 100_000}, "`messages` is a text that is not JSON"),
        ({"instruction": 0.5, "output": "Yo"}, "`instruction` is not a text"),
        ({"prompt": "Hi", "completion": True}, "`completion` is not a text"),
        ({"question": "Hi", "answer": "Yo", "solution": "No"}, "has `answer` and `solution`: choose one with --field"),
        ({"messages": [1], "conversations": [1]}, "has `messages` and `conversations`: choose one with --field"),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, "to train on the chosen one: --field completion=chosen"),
        ({"prompt": "Hi", "completion": "Yo", "image": {"bytes": "x"}}, "has `image`, and only text is trained"),
        ({"prompt": [], "completion": "Yo", "tools": ["x"]}, "`tools` holds something that is not an object"),
        (
            {"messages": [{"role": "assistant", "content": "Yo", "reasoning": "\ud83d"}]},
            "turn 1 holds half a character",
        ),
        ({"messages": [{"role": "assistant", "content": "Yo", "name": "\ud83d"}]}, "turn 1 holds half a character"),
        (
            {"messages": [{"role": "tool", "content": "Yo", "tool_call_id": "\ud83d"}]},
            "turn 1 holds half a character",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "\ud83d"}]}]},
            "turn 1 holds half a character",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "id": "\ud83d"}]}]},
            "turn 1 holds half a character",
        ),
        ({"system": "\ud83d", "prompt": "Hi", "completion": "Yo"}, "turn 0 holds half a character"),
        ({"instruction": "Hi", "output": " "}, "the assistant's turn is empty"),
        ({"text": " "}, "`text` is empty"),
        ({"text": "Yo \ud83d"}, "`text` holds half a character"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_said(row: Any, words: str) -> None:
    assert words in fault(row)


def test_arguments_that_nest_too_deep() -> None:
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    call = {"name": "f", "arguments": {"a": nested}}
    said = fault({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert said == "turn 1: `arguments` holds a value that JSON cannot express"

"""Why each token of a row is a label or not."""

from pathlib import Path
from typing import Any

import pytest

from common.commands.check_data import explain, explain_row
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.display import Display
from common.errors import UserError

PROMPT, ROW = "prompt", "turn 2: the assistant's"


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def example(*pairs: tuple[str, str], **settings: Any) -> Example:
    return Example(tuple({"role": role, "content": content, **settings} for role, content in pairs), "a.jsonl:1")


def test_the_reasons_of_a_single_turn(tokenizer: Any) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"))
    end = "turn 2: its end, where the model must stop"
    assert explain(row, Encoder(tokenizer, MaskingOptions())) == [PROMPT] * 21 + [ROW, ROW, end, PROMPT]


def test_turns_that_are_not_trained_say_why(tokenizer: Any) -> None:
    row = example(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    reasons = explain(row, Encoder(tokenizer, MaskingOptions(train_on="last")))
    assert reasons.count("turn 2: not the last assistant turn (--train-on last)") == 2
    assert reasons.count("turn 4: the assistant's") == 1
    off = example(("user", "a"), ("assistant", "b"), train=False)
    assert (
        explain(off, Encoder(tokenizer, MaskingOptions())).count("turn 2: the row says train: false (or weight: 0)")
        == 2
    )


def test_a_turn_whose_reasoning_is_left_out_says_so(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content'] +", "(m.reasoning_content or '' if loop.last else '') + m['content'] +"
    )
    row = example(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    for number in (1, 3):
        row.messages[number]["reasoning_content"] = "e"
    reasons = explain(row, Encoder(tokenizer, MaskingOptions(thinking="keep")))
    assert reasons.count("turn 2: not trained, as the template leaves out its reasoning") == 2
    assert reasons.count("turn 4: the assistant's") == 2  # what it thinks, and what it says


def test_plain_text(tokenizer: Any) -> None:
    row = Example((), "a.txt:1", text="Hi")
    assert explain(row, Encoder(tokenizer, MaskingOptions())) == [
        *["plain text: every token is learned"] * 2,
        "the end of the text, appended",
    ]


def test_the_table_marks_labels(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    explain_row(
        [example(("user", "Hi"), ("assistant", "Yo"))], 1, Encoder(tokenizer, MaskingOptions()), Display("plain")
    )
    lines = capsys.readouterr().out.splitlines()
    assert "a.jsonl:1: 25 tokens, 3 of them labels" in lines[0]
    assert sum("label" in line.split() for line in lines[1:]) == 3


def test_the_table_names_weights(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = example(("user", "Hi"), ("assistant", "Yo"), weight=0.25)
    explain_row([row], 1, Encoder(tokenizer, MaskingOptions()), Display("plain"))
    assert capsys.readouterr().out.count("label, weight 0.25") == 3


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_row_that_is_not_there(tokenizer: Any, number: int) -> None:
    with pytest.raises(UserError, match=f"--explain {number}: there are 1 rows"):
        explain_row([example(("user", "a"))], number, Encoder(tokenizer, MaskingOptions()), Display("quiet"))

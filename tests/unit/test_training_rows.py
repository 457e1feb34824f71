"""The rows of a training: what is read of them, and what is said about them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.data.dataset import Dataset, Example
from common.data.encode import load_tokenizer
from common.data.sample_prompts import row_prompts
from common.data.training_rows import TrainingRows, encode_data, report_rows
from common.display import Display
from common.options import Options


class Rows(list[Example]):
    """Rows that count how many of them are read one by one."""

    read = 0

    def __iter__(self) -> Iterator[Example]:
        for row in super().__iter__():
            self.read += 1
            yield row


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(tokenizer_folder)


def text(number: int) -> Example:
    return Example((), f"a:{number}", text="Once upon a time.")


def chat(number: int, answer: str = "Yo") -> Example:
    turns = ({"role": "user", "content": f"Hi {number}"}, {"role": "assistant", "content": answer})
    return Example(turns, f"a:{number}")


def options(**settings: Any) -> Options:
    return Options(model="m", data="a", **settings)


def encoded(tokenizer: Any, train: list[Example], valid: list[Example], **settings: Any) -> TrainingRows:
    data = Dataset(Rows(train), Rows(valid), [])
    return encode_data(options(**settings), data, tokenizer, lambda share, text: None)


def test_the_rows_are_read_up_to_the_one_that_is_the_sample(tokenizer: Any) -> None:
    train = [*map(text, range(5)), chat(5, "long " * 50), chat(6), *map(chat, range(7, 20))]
    rows = encoded(tokenizer, train, [*map(text, range(20, 40))], max_length=60, overflow="truncate")
    (prompt,) = row_prompts(rows, 1)
    assert prompt.messages == [{"role": "user", "content": "Hi 6"}]
    assert (prompt.text, prompt.answer) == ("Hi 6", "Yo")
    assert prompt.tokens == rows.train.rows.lengths[6]
    assert (rows.data.valid.read, rows.data.train.read) == (0, 7)
    assert [each.text for each in row_prompts(rows, 3)] == ["Hi 6", "Hi 7", "Hi 8"]


def test_plain_text_is_not_read_for_a_sample(tokenizer: Any) -> None:
    rows = encoded(tokenizer, [*map(text, range(5))], [text(5)])
    assert row_prompts(rows, 3) == []
    assert (rows.data.valid.read, rows.data.train.read) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train_on": "last"}, "--train-on last"),
        ({"thinking": "keep"}, "--thinking keep"),
        ({"train_on": "last", "thinking": "keep"}, "--train-on last and --thinking keep"),
        ({"train_on": "all"}, ""),
        ({}, ""),
    ],
)
def test_options_about_turns_are_told_where_all_rows_are_plain_text(
    tokenizer: Any, settings: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = encoded(tokenizer, [text(1), text(2)], [text(3)], **settings)
    report_rows(options(**settings), rows, Display("plain"))
    told = f"{named}: without effect on labels, as all 3 rows are plain text, of which every token is trained"
    assert capsys.readouterr().out == (f"warning: {told}\n" if named else "")
    rows = encoded(tokenizer, [text(1), chat(2)], [text(3)], **settings)
    report_rows(options(**settings), rows, Display("plain"))
    assert "without effect" not in capsys.readouterr().out

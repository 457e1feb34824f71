"""What is doubtful about rows, and what is not."""

import pytest

from common.config import ROOT
from common.data import Data, Example
from common.findings import doubtful
from common.sources import load_data


def row(user: str, answer: str, source: str = "a:1") -> Example:
    return Example(({"role": "user", "content": user}, {"role": "assistant", "content": answer}), source)


def found(train: list[Example], valid: list[Example] | None = None) -> dict[str, list[str]]:
    return {finding.what: finding.sources for finding in doubtful(Data(train, valid or [], []))}


@pytest.mark.parametrize(
    "text",
    ["I am {{name}}.", "Dear <your name>,\nHi", "On [insert date] we met", "TODO: answer", "made by {{ author }}"],
)
def test_placeholders(text: str) -> None:
    assert found([row("Hi", text)]) == {"rows with a placeholder left in": ["a:1"]}


@pytest.mark.parametrize(
    "text", ["a {name} b", "std::vector<int>", "[1, 2]", "<b>bold</b>", "[link](x)", "a[i] = {}", "todo"]
)
def test_what_only_looks_like_one(text: str) -> None:
    assert found([row("Hi", text)]) == ({} if text != "todo" else {"rows with a placeholder left in": ["a:1"]})


@pytest.mark.parametrize("text", ["Well, I,", "これは、", "and the", "see (", "```python\nx = 1", "次の「"])
def test_answers_that_break_off(text: str) -> None:
    assert found([row("Hi", text)]) == {"rows whose answer seems to break off": ["a:1"]}


@pytest.mark.parametrize(
    "text", ["Yes", "はい", "42", "- one\n- two", "```python\nx = 1\n```", "What for?", "https://a.b/c"]
)
def test_answers_that_do_not(text: str) -> None:
    assert found([row("Hi", text)]) == {}


def test_duplicates_contradictions_and_leakage() -> None:
    train = [row("Q", "A"), row("Q", "A", "a:2"), row("Q", "B", "a:3"), row("P", "C", "a:4")]
    valid = [row("P", "C", "v:1"), row("Q", "D", "v:2"), row("R", "E", "v:3")]
    assert found(train, valid) == {
        "rows of training that stand in validation or test too": ["v:1"],
        "validation or test rows whose prompt is in training, with another answer": ["v:2"],
        "rows that are there more than once": ["a:2"],
        "rows with a prompt that has another answer elsewhere": ["a:1", "a:3"],
    }


def test_good_rows_raise_no_alarm() -> None:
    assert doubtful(load_data(str(ROOT / "examples" / "data"), 0, 0)) == []

"""What is suspicious about rows, and what is not."""

from pathlib import Path
from time import perf_counter

import pytest

from common.data.dataset import Counted, Dataset, Example
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.findings import control_tokens, quality_warnings
from common.data.load import load_data
from tests import ROOT


def row(user: str, answer: str, source: str = "a:1") -> Example:
    return Example(({"role": "user", "content": user}, {"role": "assistant", "content": answer}), source)


def found(train: list[Example], valid: list[Example] | None = None) -> dict[str, list[str]]:
    return {finding.what: finding.sources for finding in quality_warnings(Dataset(train, valid or [], []))}


@pytest.mark.parametrize(
    "text",
    [
        "I am {{name}}.",
        "made by {{ author }}",
        "港の{{name}}です。",
        "私は{name}です。{{会社名}}にいます。",
        "I am {name}, made by {author}.",
        "Dear [NAME],\nHi",
        "My name is <name>.",
        "<name>Pip</name> and <name>",
        "Dear <your name>,\nHi",
        "On [insert date] we met",
        "Call [Your Company]!",
        "TODO: answer",
        "Lorem ipsum dolor",
    ],
)
def test_placeholders(text: str) -> None:
    assert found([row("Hi", text)]) == {"rows with a placeholder left in": ["a:1"]}


@pytest.mark.parametrize(
    "text",
    [
        "a {x} b",
        "The set {dates} of `{{name}}`s",
        "std::vector<int>",
        "[1, 2]",
        "<b>bold</b>",
        "<name>Pip</name>",
        "[url](https://a.b/c)",
        "a[i] = {}",
        "users[NAME]",
        "Say print(f'Hello {name}')",
        "<h1>Hello {name}</h1>",
        "$\\frac{{a}}{{bc}} + x^{{ab}} + x_{{ab}}$",
        "run: ${{ github.ref }}",
        "```jinja\n{{ name }}\n```",
        "Lo puedo todo: hablar",
        "Make a TODO list, or a TODO: note",
        "[INST] and [MASK]",
        "{'a': {'b': {}}}",
    ],
)
def test_what_only_looks_like_one(text: str) -> None:
    assert found([row("Hi", text)]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "Well, I,",
        "これは、",
        "as follows:",
        "this and the",
        "see (",
        "次の「",
        "```python\nx = 1",
        "```\na\n```\n\n```\nb",
    ],
)
def test_answers_that_break_off(text: str) -> None:
    assert found([row("Hi", text)]) == {"rows whose answer seems to break off": ["a:1"]}


@pytest.mark.parametrize(
    "text",
    [
        *("Yes", "はい", "港です", "42", "- one\n- two", "```python\nx = 1\n```", "What for?", "https://a.b/c"),
        *("Who are you with", "the", "No :(", "No =(", "(^_^)", "「はい」", "x```y", "A"),
    ],
)
def test_answers_that_do_not(text: str) -> None:
    assert found([row("Hi", text)]) == {}


def test_a_long_text_is_read_once() -> None:
    tags = "".join(f"<name>{number}</name>\n" for number in range(25_000))
    start = perf_counter()
    assert found([row("Hi", tags)]) == {}
    assert found([row("Hi", "\n" * 50_000 + "x")]) == {}
    assert perf_counter() - start < 2  # searched from each tag and line: above half a minute


def test_control_tokens_in_a_rows_text(tokenizer_folder: Path) -> None:
    encoder = Encoder(load_tokenizer(tokenizer_folder), MaskingOptions())
    obeyed = "Hi<|im_end|>\n<|im_start|>assistant\nSure"
    rows = [row("Hi", "<|im_start|>"), row(obeyed, "Yo", "a:2"), row("<|im_end> or <think>", "Yo", "a:3")]
    text = Example((), "a:4", text="<|im_start|>")
    (first, none), _ = encode_parts([rows, [rows[2], text]], encoder, "error")
    assert str(control_tokens([none, first])) == (
        "2 rows with control tokens in their text, read as such (<|im_start|>, <|im_end|>): a:1, a:2"
    )
    assert control_tokens([none]) is None


def test_duplicates_contradictions_and_leakage() -> None:
    train = [row("Q", "A"), row("Q", "A", "a:2"), row("Q", "B", "a:3"), row("P", "C", "a:4")]
    valid = [row("P", "C", "v:1"), row("Q", "D", "v:2"), row("R", "E", "v:3")]
    assert found(train, valid) == {
        "validation or test rows that are in training too": ["v:1"],
        "validation or test rows whose prompt is in training, with another answer": ["v:2"],
        "training rows that repeat another": ["a:2"],
        "training rows with the same prompt and different answers": ["a:1", "a:3"],
    }


def test_rows_of_one_conversation_on_both_sides() -> None:
    def talk(source: str, *turns: str) -> Example:
        roles = ("user", "assistant") * 4
        return Example(tuple({"role": r, "content": c} for r, c in zip(roles, turns, strict=False)), source)

    train = [talk("a:1", "Q", "A", "R", "B", "S", "C"), talk("a:2", "T", "D")]
    valid = [
        *(talk("v:1", "Q", "A"), talk("v:2", "Q", "A", "R", "B"), talk("v:3", "T", "D", "U", "E")),
        *(talk("v:4", "Q", "Z"), talk("v:5", "Q", "Z", "R", "B"), talk("v:6", "T", "X", "U", "E")),
    ]
    assert found(train, valid) == {
        "validation or test rows that are the beginning or the continuation of a training row": ["v:1", "v:2", "v:3"],
    }


@pytest.mark.parametrize("before", [" ", "\n", "\t", "\r\n"])
def test_a_key_at_the_beginning_of_a_line_is_seen(before: str) -> None:
    key = "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cD3fG6"
    assert [*found([row("Q", f"Here is your token:{before}{key}")], [])] == [
        "rows with an API key, a token or a private key in their text"
    ]


def test_good_rows_raise_no_alarm() -> None:
    assert quality_warnings(load_data(str(ROOT / "examples" / "data"), 0, 0)) == []


def test_calls_and_tools_are_part_of_a_row() -> None:
    def asked(city: str, *tools: dict) -> Example:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        result = [{"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}]
        return Example((*turns, *result), city, tools)

    assert found([asked("Tokyo"), asked("Kyoto")]) == {}
    assert found([asked("Tokyo")], [asked("Tokyo", {"name": "weather"})]) == {}
    assert found([asked("Tokyo"), asked("Tokyo")]) == {"training rows that repeat another": ["Tokyo"]}


def test_rows_without_an_answer_are_named() -> None:
    left_out = Counted(7, [f"a:{n}" for n in range(2, 9)])
    (finding,) = quality_warnings(Dataset([row("Q", "A")], [], [], {}, {"rows without an answer": left_out}))
    assert str(finding) == "7 rows without an answer, left out: a:2, a:3, a:4, a:5, a:6 and 2 more"


def test_plain_text_that_repeats_is_told() -> None:
    rows = [Example((), f"a:{n}", text="Once,") for n in (1, 2)]
    assert found(rows[:1], rows[1:]) == {"validation or test rows that are in training too": ["a:2"]}

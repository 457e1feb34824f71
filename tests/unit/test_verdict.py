"""The verdict that ends `check-data`: each finding with rows that have it, and with rows that have it not."""

import json
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from common.commands.check_data import check_data
from common.commands.prepare import prepare
from common.data import text_sample
from common.display import Display
from common.errors import UserError
from common.options import Options
from tests import ROOT
from tests.contexts import context
from tests.tiny import chat

MANY = 120
COLORS = ("red", "green", "blue", "black", "white", "grey")
THINGS = ("house", "boat", "garden", "letter", "window", "mountain", "river", "engine", "candle", "violin")
KINDS = [*product(COLORS, THINGS, ("in Rome", "by the sea"))]


def good(count: int = MANY) -> list[dict[str, Any]]:
    """Rows with nothing to look at."""
    rows = [
        chat(f"{number}: which {thing} is {color} {place}?", f"{thing} number {number * 7919 % 1000}")
        for number, (color, thing, place) in enumerate(KINDS)
    ]
    return rows[:count]


def verdict(
    rows: list[dict[str, Any]], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], **settings: Any
) -> dict[str, Any]:
    """The event with the verdict."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return judged(path, model, capsys, **settings)


def judged(path: Path, model: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> dict[str, Any]:
    given = {"data": str(path), "model": str(model), "valid_share": 0.0, "max_length": 512} | settings
    with suppress(UserError):  # what training would refuse is refused, behind the verdict
        check_data(Options.model_validate(given), None, Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events].count("verdict") == 1
    assert events[-1]["event"] == "verdict"
    return events[-1]


def what(event: dict[str, Any]) -> list[str]:
    return [advice["what"] for advice in event["advice"]]


def test_good_rows_are_ready(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event = verdict(good(), tiny_llama, tmp_path, capsys)
    assert (event["text"], event["advice"]) == ("\nVerdict: ready.", [])
    assert (event["rows_looked_at"], event["rows"]) == (MANY, MANY)


def test_the_example_is_ready(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    event = judged(ROOT / "examples" / "data", tiny_llama, capsys)
    assert event["text"] == "\nVerdict: ready."
    assert event["scripts"] == {"Latin": 320, "Japanese": 80}


LONG = "One sentence that is the same in every answer, with a number: "
# What is done to good rows, and what is said of them; `serious` first.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "few": (good(99), {}, ["99 training rows are few"]),
    "too few": (good(9), {}, ["9 training rows are too few"]),
    "little text": ([{"text": f"Once {row}"} for row in range(MANY)], {}, ["850 tokens of text are few"]),
    "one answer": (
        [*good(40), *(chat(f"{number}: who?", "Pip") for number in range(80))],
        {},
        ["80 of 120 answers are the same ('Pip')"],
    ),
    "only one answer": (
        [*good(10), *(chat(f"{number}: who?", "Pip") for number in range(110))],
        {},
        ["110 of 120 answers are the same ('Pip')"],
    ),
    "alike answers": (
        [*good(110), *(chat(f"{number}: why so?", f"{LONG}{number}") for number in range(10))],
        {},
        ["9 of 120 answers are nearly an earlier one's"],
    ),
    "alike rows": (
        [
            *good(100),
            *(
                chat(
                    f"{LONG} and then goes further, as no other row of them does, to a question about {number}?",
                    str(number * 37),
                )
                for number in range(20)
            ),
        ],
        {},
        ["19 of 120 rows are nearly an earlier one"],
    ),
    "too long": (
        [*good(100), *(chat(f"{number}?", f"{number} " * 60) for number in range(20))],
        {"max_length": 100},
        ["20 of 120 training rows are longer than --max-length 100: dropped"],
    ),
    "mostly too long": (
        [*good(50), *(chat(f"{number}?", f"{number} " * 60) for number in range(70))],
        {"max_length": 100},
        ["70 of 120 training rows are longer than --max-length 100: dropped"],
    ),
    "cut off": (
        [*good(100), *(chat(f"{number}?", f"{number} " * 60) for number in range(20))],
        {"max_length": 100, "overflow": "truncate"},
        ["20 of 120 training rows are longer than --max-length 100: truncated"],
    ),
    "refused": (
        [*good(), chat("why?", "word " * 60)],
        {"overflow": "error", "max_length": 100},
        ["1 of 121 training rows are longer than --max-length 100: refused"],
    ),
    "labels": (
        [chat(f"{row['messages'][0]['content']} {'x' * 420}", "y") for row in good()],
        {},
        [
            "only 0.4% of the tokens carry loss",
            "120 of 120 answers are the same ('y')",
        ],
    ),
    "unlabeled": (
        [*good(100), *(chat(f"{number}?", "") for number in range(20))],
        {},
        ["20 rows without an answer, left out"],
    ),
    "bad": ([*good(), {"texts": 1}], {"on_bad_row": "drop"}, ["1 rows that cannot be read or labeled are dropped"]),
    "script": (
        [*good(), chat("Which is it?", "これは日本語の答えです"), chat("And which?", "это по-русски")],
        {},
        [
            "1 of 122 answers are in Japanese script, unlike the others",
            "1 of 122 answers are in Cyrillic script, unlike the others",
        ],
    ),
    "personal": (
        [*good(), chat("Mail?", "jo.smith@gmail.com and al@gmail.com"), chat("Phone?", "+44 20 7946 0958")],
        {},
        ["2 places with an e-mail address", "1 places with a phone number"],
    ),
    "secret": (
        [*good(), chat("Key?", "sk-proj-Ab3dE9fGhIjKlMn0pQrStUvWxYz")],
        {},
        ["1 rows with an API key, a token or a private key in their text"],
    ),
    "placeholder": ([*good(), chat("Who?", "I am {{name}}.")], {}, ["1 rows with a placeholder left in"]),
    "placeholders": (
        [*good(), *(chat(f"{number}: Who?", f"{number} {{{{name}}}}.") for number in range(20))],
        {},
        ["20 rows with a placeholder left in"],
    ),
    "control": (
        [*good(), chat("Say <|im_end|>", "Yo")],
        {},
        ["1 rows with control tokens in their text, read as such (<|im_end|>)"],
    ),
    "repeats": ([*good(), *good(10)], {}, ["10 training rows that repeat another"]),
    "context": (
        [*good(), chat("Say it", "Yo" * 300)],
        {"max_length": 1024},
        ["1 rows are longer than the model's context of 512 tokens"],
    ),
}
SERIOUS = {"too few", "only one answer", "mostly too long", "refused", "labels", "placeholders"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_finding(name: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, settings, expected = CASES[name]
    event = verdict(rows, tiny_llama, tmp_path, capsys, **settings)
    assert sorted(what(event)) == sorted(expected)
    first, *lines = event["text"].strip().splitlines()
    serious = [advice["what"] for advice in event["advice"] if advice["serious"]]
    assert bool(serious) == (name in SERIOUS)
    things = f"{len(expected)} {'thing' if len(expected) == 1 else 'things'}"
    usable = f"Verdict: usable, {things} to look at."
    assert first == (f"Verdict: not fit to train on: {'; '.join(serious)}." if serious else usable)
    assert lines[0] == "What to do:"
    assert [line.partition(".")[0] for line in lines[1:]] == [str(n) for n in range(1, len(expected) + 1)]
    assert what(event)[: len(serious)] == serious  # first
    assert all(advice["to_do"].endswith(".") for advice in event["advice"])


# Rows that come near a finding, and have none.
HARMLESS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a hundred rows": (good(100), {}),
    "enough text": ([{"text": f"{number * 7919} " * 40} for number in range(MANY)], {}),
    "two classes": (
        [chat(row["messages"][0]["content"], "yes" if n % 2 else "no") for n, row in enumerate(good())],
        {},
    ),
    "few alike answers": (
        [*good(115), *(chat(f"{number}: why so?", f"{LONG}{number}") for number in range(5))],
        {},
    ),
    "a few long rows": ([*good(), *(chat(f"{n}?", f"{n} " * 60) for n in range(10))], {"max_length": 100}),
    "two scripts": ([*good(), *(chat(f"{n}番は？", f"{n}番は日本語です") for n in range(30))], {}),
    "a few repeats": ([*good(), *good(5)], {}),
    "a made-up address": ([*good(), chat("Mail?", "jo@example.com, +1 555 123 4567")], {}),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.slow
def test_no_finding(name: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, settings = HARMLESS[name]
    assert what(verdict(rows, tiny_llama, tmp_path, capsys, **settings)) == []


def test_personal_data_is_named_by_row_and_masked(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = verdict([*good(), chat("Mail?", "jo.smith@gmail.com")], tiny_llama, tmp_path, capsys)
    assert event["advice"][0]["sources"] == ["a.jsonl:121 (jo.***)"]
    assert "smith" not in event["text"]
    assert event["text"].endswith(
        "1. 1 places with an e-mail address (a.jsonl:121 (jo.***)). "
        "Remove what is not meant for everybody: the model may repeat it."
    )


def test_test_rows_in_training(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps(row) for row in good()]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "test.jsonl").write_text(rows[7])
    event = judged(tmp_path, tiny_llama, capsys)
    assert what(event) == ["1 validation or test rows that are in training too"]
    assert event["advice"][0]["sources"] == ["test.jsonl:1"]


def test_a_length_is_proposed(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, settings, _ = CASES["too long"]
    (advice,) = verdict(rows, tiny_llama, tmp_path, capsys, **settings)["advice"]
    assert advice["to_do"] == "--max-length 256 keeps 99 of 100 rows whole."
    assert what(verdict(rows, tiny_llama, tmp_path, capsys, max_length=256)) == []


def test_a_large_set_is_sampled_and_that_is_said(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "SAMPLED", 60)
    rows = [*good(), *(chat(f"{n}: mail?", f"al{n}.smith@gmail.com") for n in range(60))]
    event = verdict(rows, tiny_llama, tmp_path, capsys)
    assert (event["rows_looked_at"], event["rows"]) == (60, 180)
    (found,) = [advice for advice in event["advice"] if "e-mail" in advice["what"]]
    assert found["what"].endswith(" places with an e-mail address in 60 drawn rows")
    check_data(
        Options.model_validate({"data": str(tmp_path / "a.jsonl"), "model": str(tiny_llama), "valid_share": 0.0}),
        None,
        Display("plain"),
    )
    assert "texts: 60 of 180 training rows were looked at, drawn by --seed" in capsys.readouterr().out


def test_train_says_what_is_serious_in_one_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"

    def printed(rows: list[dict[str, Any]]) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"data": str(path), "model": str(tiny_llama), "valid_share": 0.0, "export": "none", "steps": 1}
        prepare(Options.model_validate(given | {"output": str(tmp_path / "run")}), None, context("plain"))
        return " ".join(capsys.readouterr().out.split())

    rows = [chat(f"{number}: Who?", f"{number} {{{{name}}}}.") for number in range(9)]
    line = (
        "warning: not fit to train on: 9 rows with a placeholder left in; 9 training rows are too few (check-data says"
    )
    assert line in printed(rows)
    assert "not fit" not in printed(good(99))
    with pytest.raises(UserError, match="every row"):
        prepare(Options(data=str(path), model=str(tiny_llama), max_length=3, export="none"), None, context("plain"))

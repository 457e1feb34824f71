"""The built-in example: its data is what the script writes, and its check cannot be fooled."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.run_record import Run
from examples import score
from examples.check import KINDS, check, nearest_train_row, parse
from examples.make_data import FOLDER, SPLITS, make_files
from tests.unit.hub import finished_run

Row = dict[str, Any]


def read(split: str) -> list[Row]:
    lines = (Path(FOLDER) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN, VALID, TEST = read("train"), read("valid"), read("test")
ALL = TRAIN + VALID + TEST


def prompt(row: Row) -> list[dict[str, str]]:
    return row["messages"][:-1]


def request(row: Row) -> str:
    return row["messages"][-2]["content"]


def answer(row: Row) -> str:
    return row["messages"][-1]["content"]


def reading(row: Row) -> tuple[str, dict[str, str]]:
    kind, slots = parse(request(row))[0]
    return kind.name, slots


def test_committed_files_are_what_the_script_writes() -> None:
    for name, content in make_files().items():
        assert (FOLDER / name).read_bytes() == content, name


@pytest.mark.parametrize(("split", "rows"), [("train", 400), ("valid", 40), ("test", 60)])
def test_counts_and_the_share_of_japanese(split: str, rows: int) -> None:
    data = read(split)
    assert len(data) == sum(SPLITS[split]) == rows
    assert sum(not request(row).isascii() for row in data) * 5 == rows
    assert all(request(row).isascii() == answer(row).isascii() for row in data)


def test_rows_are_chats_of_one_request_and_one_answer() -> None:
    for row in ALL:
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


def test_no_request_occurs_twice() -> None:
    assert len({request(row) for row in ALL}) == len(ALL)


def test_every_kind_occurs_in_every_split() -> None:
    for rows in (TRAIN, VALID, TEST):
        assert {reading(row)[0] for row in rows} == {kind.name for kind in KINDS}


def test_every_request_has_one_reading() -> None:
    assert [len(parse(request(row))) for row in ALL] == [1] * len(ALL)


def test_gold_answers_pass() -> None:
    assert [check(prompt(row), answer(row)) for row in ALL] == [[]] * len(ALL)


def test_white_space_around_an_answer_is_forgiven() -> None:
    assert check(prompt(TEST[0]), f" {answer(TEST[0])}\n") == []


def test_an_answer_to_another_request_fails() -> None:
    """Over all pairs of test rows, and therefore every constant answer fails on all rows but its own."""
    passed = [
        (i, j) for i, row in enumerate(TEST) for j, other in enumerate(TEST) if not check(prompt(row), answer(other))
    ]
    assert passed == [(i, i) for i in range(len(TEST))]


@pytest.mark.slow
def test_a_training_answer_fails_on_every_test_row() -> None:
    answers = {answer(row) for row in TRAIN + VALID}
    assert not [a for row in TEST for a in answers if not check(prompt(row), a)]


@pytest.mark.parametrize("filler", ["", "...", "it", "{slot}", "〇"])
def test_a_form_around_nothing_fails(filler: str) -> None:
    for row in TEST:
        form = parse(request(row))[0][0].form
        hollow = re.sub(r"\{(.+?)\}", lambda slot, f=filler: f.replace("slot", slot[1]), form)
        assert check(prompt(row), hollow), hollow


def test_one_wrong_slot_fails() -> None:
    """Each slot of each test row in turn is filled from another row, the others rightly."""
    for row in TEST:
        name, slots = reading(row)
        others = [reading(r)[1] for r in TEST if reading(r)[0] == name]
        form = parse(request(row))[0][0].form
        for slot in slots:
            for value in {other[slot] for other in others} - {slots[slot]}:
                faults = check(prompt(row), form.format(**slots | {slot: value}))
                assert faults == [f"the {slot} is {value!r}, not {slots[slot]!r}"]


def test_the_request_itself_and_its_bare_facts_fail() -> None:
    for row in TEST:
        assert check(prompt(row), request(row))
        assert check(prompt(row), " ".join(reading(row)[1].values()))
        assert check(prompt(row), answer(row) + " And more.")
        assert check(prompt(row), answer(row)[:-1])
        assert check(prompt(row), "")


def test_the_right_facts_in_another_kinds_form_fail() -> None:
    for row in TEST:
        name, slots = reading(row)
        for kind in KINDS:
            if kind.name != name:
                values = iter([*slots.values()] * 3)
                assert check(prompt(row), re.sub(r"\{.+?\}", lambda _, v=values: next(v), kind.form))


def test_faults_are_told_in_plain_words() -> None:
    ask = [{"role": "user", "content": "Please load 12 pots."}]
    assert check(ask, "Aye aye! 12 pots, safe in the hold.") == []
    assert check(ask, "Sure, 12 pots!") == [
        "it does not have the form of a cargo answer: Aye aye! {count} {goods}, safe in the hold."
    ]
    assert check(ask, "Sure!")[1:] == ["it does not name the count '12'", "it does not name the goods 'pots'"]
    assert check(ask, "Aye aye! 21 pots, safe in the hold.") == ["the count is '21', not '12'"]
    assert "0 readings" in check([{"role": "user", "content": "What is love?"}], "Aye aye!")[0]


def test_what_fills_test_rows_is_in_no_training_row() -> None:
    seen = "\n".join(m["content"] for row in TRAIN + VALID for m in row["messages"])
    words = {word.rstrip("s").lower() for word in re.findall(r"[A-Za-z]+|\d+:\d\d|\d+", seen)}
    for row in TEST:
        for value in reading(row)[1].values():
            if value.isascii():
                assert value.rstrip("s").lower() not in words, value
            else:
                assert value not in seen, value


def test_some_phrasings_are_in_no_training_row() -> None:
    """Of every kind, test holds a phrasing that training lacks, so a kind is known by more than its wording."""

    def phrasing(row: Row) -> str:
        text = request(row)
        for slot, value in sorted(reading(row)[1].items(), key=lambda item: -len(item[1])):
            text = text.replace(value, f"<{slot}>", 1)
        return text

    trained = {phrasing(row) for row in TRAIN}
    fresh = [row for row in TEST if phrasing(row) not in trained]
    assert {reading(row)[0] for row in fresh} == {kind.name for kind in KINDS}
    assert len(fresh) >= 12


@pytest.mark.slow
def test_nearest_train_row() -> None:
    index, likeness = nearest_train_row(TRAIN[7], TRAIN)
    assert (index, likeness) == (7, 1.0)
    for row in TEST:
        index, likeness = nearest_train_row(row, TRAIN)
        assert 0 <= index < len(TRAIN)
        assert 0.3 < likeness < 1.0


# --- the count of a run's answers


def test_a_run_of_something_else_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "run")
    assert score.main([str(run)]) == 0
    assert f"Nothing to count: {run} is not of the built-in example." in " ".join(capsys.readouterr().out.split())
    assert score.main([str(run), "--at-least", "1"]) == 1


def test_the_run_is_named_by_trains_options_or_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run in runs/"):
        score.main([])
    for number, name in enumerate(("old", "new")):
        run = finished_run(tmp_path / "runs" / name)
        os.utime(run / "run.json", (number, number))
    named = {
        (): "runs/new",
        ("--trained",): "runs/new",
        ("--trained", "--steps", "4", "--output", "runs/old"): "runs/old",
        ("--trained", "--resume=runs/old", "--quiet"): "runs/old",
        ("runs/old",): "runs/old",
    }
    for words, run in named.items():
        counted: list[Run] = []
        monkeypatch.setattr(score, "score", lambda run, context, to=counted: to.append(run) or {"after": 0})
        assert score.main(list(words)) == 0
        assert [str(run) for run in counted] == [run], words

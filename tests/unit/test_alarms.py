"""Every sign of collapse is raised by figures that show it, once, and by none that do not."""

from typing import Any

import pytest

from common.evaluation.alarms import Alarms, repetition


def steps(alarms: Alarms, losses: list[float], norms: list[float] | None = None, first: int = 1) -> list[str]:
    found = []
    for number, loss in enumerate(losses):
        norm = norms[number] if norms else 1.0
        found += alarms.step({"step": first + number, "loss": loss, "grad_norm": norm})
    return [alarm.name for alarm in found]


def validations(alarms: Alarms, *losses: float) -> list[str]:
    found = []
    for number, loss in enumerate(losses):
        found += alarms.validation({"step": 10 * number, "valid_loss": loss})
    return [alarm.name for alarm in found]


def answers(
    *texts: str, reference: str = "It is so.", ended: bool = True, copied: bool = False
) -> list[dict[str, Any]]:
    return [
        {"answer": text, "reference": f"{reference}{number}", "ended": ended, "copied": copied}
        for number, text in enumerate(texts)
    ]


def names(alarms: Alarms, lines: list[dict[str, Any]], step: int = 5, last: bool = False) -> list[str]:
    return [alarm.name for alarm in alarms.answers(step, lines, last)]


FALLING = [3 - 0.05 * number for number in range(40)]


def test_a_falling_loss_raises_nothing() -> None:
    assert steps(Alarms(2), FALLING) == []


def test_a_loss_that_jumps_and_stays_is_raised_once_with_its_remedy() -> None:
    alarms = Alarms(2)
    assert steps(alarms, [*FALLING, 9.0, 9.0]) == []
    assert steps(alarms, [9.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0], first=43) == ["loss"]
    assert str(alarms.raised[0]) == (
        "the loss jumped to 9.00 at step 43, from about 1.42. Usual cause: a learning rate that is too high. "
        "Remedy: lower --learning-rate to a third"
    )


def test_one_hard_step_is_no_collapse() -> None:
    assert steps(Alarms(2), [*FALLING, 9.0, 1.0, 9.0, 1.0]) == []


def test_a_gradient_that_explodes() -> None:
    assert steps(Alarms(2), [1.0] * 30, [1.0] * 27 + [30.0] * 3) == ["gradient"]
    assert steps(Alarms(2), [1.0] * 30, [1.0] * 27 + [10.0] * 3) == []


def test_a_loss_that_jumps_at_once() -> None:
    alarms = Alarms(2)
    assert steps(alarms, [3.8, 4.9, 3.6, 4.6, 7.0, 9.3, 11.0, 9.9, 10.5]) == ["loss"]
    assert (alarms.raised[0].seen, alarms.raised[0].since) == ("the loss jumped to 10.50 at step 9, from about 3.80", 5)
    assert steps(Alarms(2), [3.8, 4.9, 3.6, *[5.6] * 9]) == []
    assert steps(Alarms(2), [3.8, 4.9, 3.6, 7.0, 9.3, 11.0, 9.9, 4.0]) == []


def test_the_steps_of_the_warm_up_say_little() -> None:
    assert steps(Alarms(30), [1.0] * 20 + [9.0] * 10) == []


def test_a_validation_that_rises_while_training_falls() -> None:
    alarms = Alarms(0)
    assert validations(alarms, 3.0, 2.0) == []
    steps(alarms, FALLING)
    assert [a.name for loss in (2.2, 2.4) for a in alarms.validation({"step": 30, "valid_loss": loss})] == []
    alarms = Alarms(0)
    steps(alarms, [2.0] * 10)
    assert validations(alarms, 3.0, 2.0) == []
    steps(alarms, [1.0] * 20)
    found = [a for loss in (2.7, 2.8) for a in alarms.validation({"step": 30, "valid_loss": loss})]
    assert [a.name for a in found] == ["overfitting"]
    assert found[0].seen == "the validation loss rose from 2.000 to 2.800 at step 30, while the training loss fell"
    alarms = Alarms(0, overfitting=False)
    steps(alarms, [2.0] * 10)
    validations(alarms, 3.0, 2.0)
    steps(alarms, [1.0] * 20)
    assert [a for loss in (2.7, 2.8) for a in alarms.validation({"step": 30, "valid_loss": loss})] == []


def test_a_validation_worse_than_before_training() -> None:
    assert validations(Alarms(5), 2.0, 2.2) == ["worse"]
    assert validations(Alarms(5), 2.0, 2.05, 1.9) == []
    assert validations(Alarms(50), 2.0, 2.2) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (answers("ha " * 40, "ho " * 40, "fine"), ["repetition"]),
        (answers("ha " * 40, "good", "fine"), []),
        (answers("", " ", "fine"), ["empty"]),
        (answers("word " * 3 + "and so on, and more and more of it", "x" * 50, "fine", ended=False), ["endless"]),
        (answers("a", "b", "c", ended=False), []),
        (answers("Yes.", "Yes.", "Yes."), ["same"]),
        (answers("Yes.", "Yes.", "No."), []),
        (answers(*(f"I am a model of language, trained by {who}." for who in "ABC")), ["same"]),
        (answers(*(f"I am {who}, and {who} is what I am." for who in ("Mio", "Ben", "Ada"))), []),
        (answers("Good.<|eot_id|><|start_header_id|>", "Fine.", "Yes."), ["markers"]),
        (answers("a <|b", "[INS] it", "<start>"), []),
        (answers("ha " * 40), []),  # one answer says little
        (answers("The harbor is closed.", "Tea is at four.", "fine", copied=True), ["copies"]),
        (answers("It is so: closed.", "It is so, yes.", "fine", copied=True), []),  # like the rows' own
    ],
)
def test_answers(lines: list[dict[str, Any]], expected: list[str]) -> None:
    alarms = Alarms(0)
    assert names(alarms, lines) == []  # once
    assert names(alarms, lines) == expected
    assert names(alarms, lines) == []  # it was said
    assert names(Alarms(0), lines, step=0) == []  # the base's


@pytest.mark.parametrize(("copied", "remedy"), [(True, "vary the rows"), (False, "lower --learning-rate to a third")])
def test_one_answer_for_all_is_of_the_rows_where_it_stands_in_them(copied: bool, remedy: str) -> None:
    alarms, lines = Alarms(0), answers("It is so: closed.", "It is so: closed.", copied=copied)
    alarms.answers(5, lines)
    assert [alarm.remedy for alarm in alarms.answers(10, lines)] == [remedy]


def test_answers_are_as_alike_as_the_rows_own() -> None:
    def lines(*texts: str, own: list[str], ended: bool = True) -> list[dict[str, Any]]:
        return [{"answer": text, "reference": row, "ended": ended} for text, row in zip(texts, own, strict=True)]

    way = "Go past the sawmill to the {}; it takes twenty minutes.".format
    own = [way(place) for place in ("old harbor", "mill stream", "north ridge")]
    few = lines(way("lake"), way("lake"), way("rocks"), own=own)
    assert names(Alarms(0), few, last=True) == []
    assert names(Alarms(0), lines(*[way("lake")] * 3, own=own), last=True) == ["same"]
    letters = [f"Dear customer, thank you for your letter. {number}" * 2 for number in ("We", "You", "Nobody")]
    cut = lines(*(text[:40] for text in letters), own=letters, ended=False)
    assert names(Alarms(0), cut, last=True) == []  # nor do the rows' own differ so far


def test_one_class_for_all_is_of_the_rows() -> None:
    """Its rows' own answers are training answers too, so nothing is copied."""
    lines = [
        {"answer": "praise", "reference": own, "ended": True, "known": True, "copied": False}
        for own in ("praise", "complaint", "question")
    ]
    (alarm,) = Alarms(0).answers(5, lines, last=True)
    assert (alarm.name, alarm.remedy) == ("same", "vary the rows")


def test_after_the_last_validation_a_sign_counts_at_once() -> None:
    lines = answers("", " ", "fine")
    assert names(Alarms(0), lines) == []
    assert names(Alarms(0), lines, last=True) == ["empty"]


def test_an_empty_answer_to_a_given_prompt_is_not_right() -> None:
    given = [{"answer": "", "reference": "", "ended": True}] * 2
    rows = [
        {"answer": "", "reference": own, "ended": True} for own in ("Tea at four o'clock.", "The harbor is closed.")
    ]
    assert "same" in names(Alarms(0), [*given, *rows], last=True)


def test_drift_from_the_base() -> None:
    alarms = Alarms(0)
    assert alarms.drift(0, 0.0, 1.5) == []
    assert alarms.drift(5, 1.0, 1.6) == []
    assert alarms.drift(5, 4.0, 1.5) == []  # as a base model that learns to answer
    assert alarms.drift(5, 4.0, 2.4) == []  # as good runs on few rows do
    (alarm,) = alarms.drift(10, 4.0, 2.6)
    assert alarm.seen == (
        "on prompts outside of the data the model is 4.0 nats a token from its base at step 10, and gives their right "
        "answers much less probability than before training"
    )
    assert alarms.drift(15, 5.0, 2.7) == []
    alarms = Alarms(0)
    alarms.drift(0, 0.0, 1.5)
    validations(alarms, 2.0, 1.0)
    assert alarms.drift(10, 9.0, 6.0) == []  # a narrow task that is learned better and better
    alarms.validation({"step": 20, "valid_loss": 1.2})
    assert [(alarm.name, alarm.since) for alarm in alarms.drift(20, 9.0, 6.0)] == [("drift", 20)]
    assert Alarms(0).drift(10, 9.0, 0.5) == []  # nothing is known from before training


def test_few_kinds_of_answers_may_be_alike() -> None:
    lines = [answer | {"reference": own} for answer, own in zip(answers("a", "a", "a"), "aab", strict=True)]
    alarms = Alarms(0)
    assert names(alarms, lines) == names(alarms, lines) == []


def test_a_line_without_its_figures_is_passed_over() -> None:
    alarms = Alarms(0)
    for line in ({"step": 1}, {"step": 1, "loss": "2", "grad_norm": 1.0}, {"step": 1, "valid_loss": None}, {}):
        assert alarms.see(line) == []


def test_repetition_is_a_share_of_the_text() -> None:
    assert repetition("short") == 0.0
    assert repetition("ab" * 100) > 0.9
    assert repetition("The quick brown fox jumps over the lazy dog while the sun sets behind the old mill.") < 0.1

"""A training is watched by its answers: asked at each validation, shown, kept, and never in its way."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.backend import OutOfMemory, StepResult
from common.commands import prepare, watch
from common.commands.train import run_training
from common.commands.watch import Collapsed
from common.data.encode import Encoded, load_tokenizer
from common.data.sample_prompts import SamplePrompt, given_prompts, trained_answers
from common.display import Display
from common.errors import UserError
from common.evaluation import samples as module
from common.evaluation.samples import Samples
from common.options import Options
from common.run_record import Run
from common.training.loop import Interrupted
from common.training.metrics import Metrics
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

PROMPTS = [SamplePrompt([{"role": "user", "content": text}], f"no {text}", 90, 80) for text in ("a", "b")]


class Model:
    """Answers with texts that are given; what ends with ... is cut at its tokens."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    def answer(self, messages: Any, sampling: Any, tools: Any) -> Any:
        assert (sampling.temperature, sampling.max_tokens) == (0, module.LONGEST)
        self.asked.append(messages)
        text = self.answers.pop(0)
        yield from ((letter, None) for letter in text)
        yield "", "length" if text.endswith("...") else "stop"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def never() -> bool:
    return False


def opened(file: Path, step: int = 0, unvalidated: bool = False) -> Metrics:
    return Metrics(file, step, unvalidated, pytest.fail)


def test_answers_are_kept_and_shown_beside_those_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.jsonl"
    samples = Samples(Model("A", "B", "C", "D..."), PROMPTS, opened(file))  # type: ignore[arg-type]
    samples.ask(0, Display("plain"), never)
    answers = samples.ask(5, Display("plain"), never)
    assert [(answer["answer"], answer["ended"]) for answer in answers] == [("C", True), ("D...", False)]
    assert lines(file)[2:] == [
        {
            "step": 5,
            "number": 0,
            "prompt": "a",
            "reference": "no a",
            "answer": "C",
            "ended": True,
            "known": False,
            "copied": False,
        },
        {
            "step": 5,
            "number": 1,
            "prompt": "b",
            "reference": "no b",
            "answer": "D...",
            "ended": False,
            "known": False,
            "copied": False,
        },
    ]
    assert capsys.readouterr().out == "before the first step: 'a' -> 'A'\nstep 5: 'a' -> 'C' (before: 'A')\n"


def test_a_resumed_run_knows_the_answers_from_before_and_repeats_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.jsonl"
    samples = Samples(Model(*"ABCDEF"), PROMPTS, opened(file))  # type: ignore[arg-type]
    for step in (0, 5, 10):
        samples.ask(step, Display("quiet"), never)
    Samples(Model("G", "H"), PROMPTS, opened(file, 5, unvalidated=True)).ask(5, Display("plain"), never)  # type: ignore[arg-type]
    assert [(line["step"], line["answer"]) for line in lines(file)] == [(0, "A"), (0, "B"), (5, "G"), (5, "H")]
    assert capsys.readouterr().out == "step 5: 'a' -> 'G' (before: 'A')\n"


def test_an_answer_has_half_as_many_tokens_again_as_the_rows_own(tmp_path: Path) -> None:
    asked: list[int] = []

    class Measured(Model):
        def answer(self, messages: Any, sampling: Any, tools: Any) -> Any:
            asked.append(sampling.max_tokens)
            yield "", "stop"

    prompts = [replace(PROMPTS[0], labels=labels) for labels in (12, 70, 0)]
    Samples(Measured(), prompts, opened(tmp_path / "samples.jsonl")).ask(0, Display("quiet"), never)  # type: ignore[arg-type]
    assert asked == [26, 96, 96]


def test_an_answer_of_a_training_row_is_a_copy_unless_the_rows_own_is_one(tmp_path: Path) -> None:
    samples = Samples(
        Model("Yes.", "No.", "No idea."),  # type: ignore[arg-type]
        [PROMPTS[0], replace(PROMPTS[0], answer="No."), PROMPTS[0]],
        opened(tmp_path / "samples.jsonl"),
        trained={"Yes.", "No."},
    )
    assert [line["copied"] for line in samples.ask(3, Display("quiet"), never)] == [True, False, False]


def test_what_a_model_may_have_learned_by_heart(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in (" Hello you", "What?", " Fine. ")]
    ids = np.concatenate([*texts, [tokenizer.eos_token_id]]).astype(np.int32)
    first, second = len(texts[0]), len(texts[0]) + len(texts[1])
    mask = (np.arange(len(ids)) < first) | (np.arange(len(ids)) >= second)
    assert trained_answers([Encoded(ids, mask, "a.jsonl:1")], tokenizer) == {"Hello you", "Fine."}


def test_answers_that_take_too_long_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    class Slow(Model):
        def answer(self, *args: Any) -> Any:
            for piece in super().answer(*args):
                clock[0] += 2
                yield piece

    file = tmp_path / "samples.jsonl"
    samples = Samples(Slow(*"ABCDEFG"), [*PROMPTS, PROMPTS[0]], opened(file))  # type: ignore[arg-type]
    assert [line["answer"] for line in samples.ask(0, Display("quiet"), never)] == ["A", "B"]  # 8 of 8 seconds
    clock[0] += 100  # of which 3 % are 3 seconds
    assert samples.ask(5, Display("quiet"), never) == []
    clock[0] += 1000
    assert [line["answer"] for line in samples.ask(10, Display("quiet"), never)] == ["D", "E", "F"]
    assert [line["step"] for line in lines(file)] == [0, 0, 10, 10, 10]


def test_at_the_last_validation_there_is_as_much_time_as_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    class Slow(Model):
        def answer(self, *args: Any) -> Any:
            clock[0] += 3
            yield from super().answer(*args)

    samples = Samples(Slow(*"ABCDEF"), [*PROMPTS, PROMPTS[0]], opened(tmp_path / "samples.jsonl"))  # type: ignore[arg-type]
    assert len(samples.ask(0, Display("quiet"), never)) == 2
    assert samples.ask(5, Display("quiet"), never) == []
    assert len(samples.ask(9, Display("quiet"), never, last=True)) == 2


@pytest.mark.parametrize(("seconds", "between"), [(2, 30), (5, 120), (10, 300)])
def test_a_slow_machine_saves_up_for_answers_to_all_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, between: float
) -> None:
    clock, spent = [0.0], [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    class Slow(Model):
        def answer(self, *args: Any) -> Any:
            self.answers.append("A")
            for piece in super().answer(*args):
                clock[0] += seconds / 2
                spent[0] += seconds / 2
                yield piece

    samples = Samples(Slow(), [*PROMPTS, PROMPTS[0]], opened(tmp_path / "samples.jsonl"))  # type: ignore[arg-type]
    counts = []
    for step in range(40):
        counts.append(len(samples.ask(step, Display("quiet"), never)))
        clock[0] += between
    assert set(counts[1:]) == {0, 3}  # all or none
    assert sum(counts) * seconds > 0.6 * spent[0]
    assert 0.02 * clock[0] < spent[0] < 8 + 0.03 * clock[0]


def test_a_stop_comes_between_two_tokens(tmp_path: Path) -> None:
    model = Model("A" * 50, "B")
    samples = Samples(model, PROMPTS, opened(tmp_path / "samples.jsonl"))  # type: ignore[arg-type]
    assert samples.ask(0, Display("quiet"), lambda: bool(model.asked)) == []
    assert len(model.asked) == 1


def test_a_given_prompt_follows_the_rows_system_turn() -> None:
    system = {"role": "system", "content": "Pip"}
    rows = [SamplePrompt([system, {"role": "user", "content": "a"}], "b", 9)]
    (given,) = given_prompts(["Hi"], rows)
    assert given.messages == [system, {"role": "user", "content": "Hi"}]
    assert given_prompts(["Hi"], PROMPTS)[0].messages == [{"role": "user", "content": "Hi"}]


# --- in a training


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return {
        **{"model": str(tiny_llama), "data": str(write_rows(tmp_path / "rows.jsonl")), "output": str(tmp_path / "run")},
        **{"backend": "torch", "device": "cpu", "precision": "fp32", "export": "none"},
        **{"rank": 2, "steps": 6, "eval_every": 3, "valid_share": 0.5},
    }


def train(given: dict[str, Any], backend: type[Bigram] = Bigram) -> Path:
    return run_training(Options.model_validate(given), context(create=backend))


def test_every_validation_asks_three_prompts_and_the_given_ones_first(given: dict[str, Any]) -> None:
    folder = train(given | {"sample_prompt": [long := "What now? " * 200]})
    found, drift = [], []
    for line in lines(folder / "samples.jsonl"):
        (found if "answer" in line else drift).append(line)
    assert [line["step"] for line in drift] == [0, 3, 6]
    assert drift[0]["drift"] == 0.0
    assert [(line["step"], line["number"]) for line in found] == [(step, n) for step in (0, 3, 6) for n in range(4)]
    assert found[0]["prompt"] == long
    assert all(line["reference"] for line in found[1:4])
    plain = train(given | {"output": str(folder.with_name("plain")), "no_text": True, "eval_every": 2})
    assert lines(plain / "samples.jsonl")[0].keys() == {"step", "drift", "quiz_loss"}
    assert Run(plain).recipe.steps == 6


def test_what_training_has_cost_elsewhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    watch._say_forgotten({0: 3.1, 3: 3.414, 6: 4.0}, 3, Display("plain"))
    assert "a loss of 3.41 at step 3, and had 3.10 before training" in " ".join(capsys.readouterr().out.split())
    watch._say_forgotten({0: 3.1, 6: 4.0}, 3, Display("plain"))  # it was not asked then
    assert "a loss of 4.00 at step 6" in " ".join(capsys.readouterr().out.split())
    watch._say_forgotten({0: 3.1}, 3, Display("plain"))
    assert capsys.readouterr().out == ""


def test_a_model_that_cannot_answer_costs_no_training(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Mute(Bigram):
        def generate(self, *args: Any) -> Any:
            raise OutOfMemory("no")

    folder = train(given, Mute)
    assert Run(folder).record.status == "complete"
    said = "warning: the model is not asked any more during training: Memory ran out: no\n"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.slow
def test_a_stop_in_an_answer_is_saved_and_resumed(given: dict[str, Any]) -> None:
    complete = train(given | {"output": str(Path(given["output"]).with_name("complete"))})

    class Stops(Bigram):
        def generate(self, *args: Any) -> Any:
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().generate(*args)

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        train(given, Stops)
    folder = train({"resume": given["output"]})
    assert lines(folder / "samples.jsonl") == lines(complete / "samples.jsonl")


@pytest.mark.parametrize("mode", ["warn", "stop"])
def test_a_collapse_is_told_kept_and_stops_where_that_was_asked_for(
    given: dict[str, Any], mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "check_push", lambda *_: None)  # asks the hub

    class Harmed(Bigram):
        def eval_step(self, batch: Any) -> Any:
            return StepResult.of([batch], (2.0 + len(self.calls)) * batch.label_tokens, 0.0, 0)

    given |= {"on_collapse": mode, "warmup": 0.0, "push": "me/mine" if mode == "stop" else None}
    if mode == "stop":
        with pytest.raises(Collapsed) as caught:
            train(given, Harmed)
        what, fix = caught.value.args
        assert what.startswith("Training was stopped after step 4, and saved, because the validation loss is 5.000")
        again = f"train --resume {given['output']}"
        assert f"{again} --push me/mine --on-collapse rollback" in fix
        assert fix.endswith(f"Continue all the same: python cli.py {again} --push me/mine")
    else:
        train(given, Harmed)
    folder = Path(given["output"])
    said = "warning: the validation loss is 5.000 at step 3, above 2.000 before training. Usual cause: a learning rate"
    assert said in capsys.readouterr().err.replace("\n", " ")
    record = Run(folder).record
    assert record.alarms[0].name == "worse"
    assert record.steps == (6 if mode == "warn" else 4)
    if mode == "stop":
        train({"resume": str(folder)}, Harmed)
        assert "above 2.000" not in capsys.readouterr().err  # it was said
        assert Run(folder).record.status == "complete"


def test_a_resumed_run_has_seen_its_alarms_in_their_order(tmp_path: Path) -> None:
    """A quiz that was no sign while the validation loss was at its best is none when a later loss is known."""
    figures = {"metrics.jsonl": "valid_loss", "samples.jsonl": "drift"}
    validations, drifts = {0: 3.0, 10: 1.0, 20: 2.0}, {0: 0.0, 10: 9.0}
    for file, values in zip(figures, (validations, drifts), strict=True):
        made = [{"step": step, figures[file]: value, "quiz_loss": value} for step, value in values.items()]
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in made))
    job = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path, record=SimpleNamespace(alarms=[])),
        recipe=SimpleNamespace(warmup_steps=0, patience=0),
        valid=range(10),
    )
    alarms = watch._alarms_until(job, SimpleNamespace(step=20))  # type: ignore[arg-type]
    assert alarms.known == set()
    assert [alarm.name for alarm in alarms.drift(30, 9.0, 9.0)] == ["drift"]


def test_a_prompt_needs_its_text() -> None:
    from common.commands.arguments import read_flags
    from common.option_sources import load_options

    assert load_options(read_flags(["--sample-prompt", "Hi there", "Bye"]))[0].sample_prompt == ["Hi there", "Bye"]
    with pytest.raises(UserError, match="--sample-prompt needs a value"):
        load_options(read_flags(["--sample-prompt"]))

"""`eval`: every model on the same rows, what is kept is not made again, and faults come before anything is loaded."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cli
from common.commands import eval as command
from common.commands.eval import Given, evaluate
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.errors import Refusal, UserError
from common.evaluation.report import folder_of
from common.evaluation.rows import JudgedRow
from common.evaluation.subjects import Opened, Subject
from common.inference.backend_chat import ChatModel
from tests.contexts import context
from tests.tiny import chat
from tests.unit.test_chat_models import with_ggufs, write_run


class Model:
    """A subject that answers each question by `answers`, and has a loss of `loss` a label token."""

    def __init__(self, name: str, loss: float, answers: dict[str, str]) -> None:
        self.name, self.loss, self.answers = name, loss, answers
        self.asked: list[str] = []
        self.scored: list[str] = []

    def subject(self) -> Subject:
        return Subject(self.name, [self.name, self.loss], self.opened)

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        yield Opened(self.losses, self.chat)

    @contextmanager
    def losses(self, longest: int) -> Iterator[Any]:
        def of(row: Any) -> tuple[float, float]:
            self.scored.append(row.source)
            return self.loss * row.label_tokens, row.label_tokens

        yield of

    @contextmanager
    def chat(self) -> Iterator[ChatModel]:
        def answer(messages: Any, sampling: Any, tools: Any) -> Iterator[tuple[str, str | None]]:
            question = messages[-1]["content"]
            self.asked.append(question)
            assert (sampling.temperature, sampling.max_tokens) == (0, 7)
            if question not in self.answers:
                raise Refusal(f"{question} is too long", "")
            yield self.answers[question], None
            yield "", "length" if self.answers[question] == "cut" else "stop"

        yield ChatModel(self.name, answer)


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`go(*models, options)` judges the models on four rows; its results are in `go.out`."""
    path = tmp_path / "test.jsonl"
    lines = [chat("a", "1"), chat("b", "2"), chat("c", "3"), {"prompt": "d"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = Encoder(load_tokenizer(tokenizer_folder), MaskingOptions())

    def go(*models: Model, words: str = "--metric exact") -> None:
        given = Given([model.subject() for model in models], encoder, tmp_path / "unused")
        monkeypatch.setattr(command, "given_by", lambda *args: given)
        argv = f"M --data {path} --out {go.out} --max-tokens 7 {words}".split()  # type: ignore[attr-defined]
        evaluate(parsed(argv), context("plain"))

    go.out = tmp_path / "out"  # type: ignore[attr-defined]
    return go


def parsed(argv: list[str]) -> argparse.Namespace:
    return cli.build_parser("eval").parse_args(["eval", *argv])


def models() -> tuple[Model, Model]:
    base = Model("base", 2.0, {"a": "1", "b": "?", "c": "?", "d": "?"})
    return base, Model("Q4_K_M", 0.5, {"a": "1", "b": "2", "c": "<think>\n3\n</think>\n\n3", "d": "cut"})


def scores(job: Any) -> dict[str, Any]:
    return json.loads((job.out / "scores.json").read_text())  # type: ignore[no-any-return]


def test_models_are_side_by_side_and_against_the_base(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job(*models(), words=r"--metric exact --regex \d")
    found = scores(job)
    assert found["models"]["base"]["loss"]["value"] == pytest.approx(2.0)
    assert found["models"]["base"]["perplexity"]["value"] == pytest.approx(7.389, abs=1e-3)
    assert found["models"]["Q4_K_M"]["exact"] == {"value": 1.0, "low": 1.0, "high": 1.0, "rows": 3}
    assert found["models"]["base"]["exact"]["value"] == pytest.approx(1 / 3)
    assert found["models"]["Q4_K_M"]["regex"]["value"] == 0.75
    assert found["against_base"]["Q4_K_M"]["loss"]["value"] == pytest.approx(-1.5)
    change = found["against_base"]["Q4_K_M"]["exact"]
    assert change["value"] == pytest.approx(2 / 3)
    assert change["low"] <= change["value"] <= change["high"]
    printed = capsys.readouterr().out
    for words in ("1 of 3, 33%", "3 of 3, 100%", "3 of 4, 75%", "exact, 3 rows", "-1.5000", "+67%"):
        assert words in printed, words
    assert "1 of 4 rows do not end with an answer" in printed
    assert "Q4_K_M: 1 of 4 answers were cut at --max-tokens 7 or --context" in printed
    rows = [json.loads(line) for line in (job.out / "rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [f"test.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert rows[1]["reference"] == "2"
    assert rows[1]["models"]["base"] == {"answer": "?", "finish": "stop", "loss": 2.0, "exact": 0.0, "regex": 0.0}
    assert rows[3]["models"]["Q4_K_M"] == {"answer": "cut", "finish": "length", "regex": 0.0}


def test_what_is_kept_is_not_made_again(job: Any, tmp_path: Path) -> None:
    base, tuned = models()
    job(base, tuned)
    assert (len(base.asked), len(base.scored)) == (4, 3)
    job(base, tuned, words="--metric exact chrf")
    assert (len(base.asked), len(base.scored)) == (4, 3)
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps(chat("a", "4")) + "\n" + json.dumps(chat("e", "5")) + "\n")
    base.answers["e"] = tuned.answers["e"] = "5"
    job(base, tuned)
    assert base.asked[4:] == ["e"]
    assert len(scores(job)["models"]["base"]) == 3
    job(base, tuned, words="--metric exact --context 9000")  # some may have been cut by the smaller one
    assert base.asked[5:] == ["a", "b", "c", "d", "a", "e"]


def test_another_file_of_the_same_name_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, english = tmp_path / "eval" / "test", {"data": "/en/test.jsonl"}

    def kept(found: Path, about: dict[str, str]) -> Path:
        found.mkdir(parents=True)
        (found / "scores.json").write_text(json.dumps(about))
        return found

    assert kept(folder_of(folder, english), english) == folder
    assert folder_of(folder, english) == folder
    japanese = {"data": "/ja/test.jsonl"}
    assert kept(folder_of(folder, japanese), japanese) == tmp_path / "eval" / "test-2"
    assert folder_of(folder, japanese) == tmp_path / "eval" / "test-2"
    assert folder_of(folder, {"data": "test.jsonl", "model": "m"}) == tmp_path / "eval" / "test-3"
    (folder / "scores.json").write_text("{")
    assert folder_of(folder, japanese) == folder


def test_a_scorer_that_fails_keeps_the_answers(job: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def score(row, answer):\n    return 1 if row.get('prompt') != 'd' else 1 / 0\n")
    base, tuned = models()
    with pytest.raises(UserError, match=r"score\(\) failed on test\.jsonl:4: line 2: ZeroDivisionError"):
        job(base, tuned, words=f"--scorer {file}")
    assert not (job.out / "scores.json").exists()
    file.write_text("def score(row, answer):\n    return len(answer) / 2  # corrected\n")
    job(base, tuned, words=f"--scorer {file}")
    assert (len(base.asked), len(tuned.asked)) == (4, 4)
    assert scores(job)["models"]["base"]["score"]["value"] == 0.5


def test_a_refused_prompt_is_left_out_for_all_and_asked_again(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = models()
    del tuned.answers["b"]
    job(base, tuned)
    assert scores(job)["models"]["base"]["exact"] == scores(job)["models"]["base"]["exact"] | {"rows": 2, "value": 0.5}
    assert "Q4_K_M refused 1 prompts, whose rows are left out for all: test.jsonl:2: b is too long" in " ".join(
        capsys.readouterr().out.split()
    )
    tuned.answers["b"] = "2"
    job(base, tuned)
    assert (tuned.asked[4:], scores(job)["models"]["base"]["exact"]["rows"]) == (["b"], 3)
    nothing = Model("other", 1.0, {})
    with pytest.raises(UserError, match="Every prompt was refused: a is too long"):
        job(nothing)


@pytest.mark.parametrize("here", [True, False])
def test_rows_that_the_run_was_trained_on_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: bool
) -> None:
    rows = [JudgedRow(f"test.jsonl:{n}", {}, Example(({"role": "user", "content": "a"},), "")) for n in range(1, 5)]
    learned = Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "train.jsonl:7")
    monkeypatch.setattr(command, "data_of", lambda run, options: SimpleNamespace(train=[learned]))
    data = str(tmp_path) if here else "who/knows"
    run: Any = SimpleNamespace(record=SimpleNamespace(options={"data": [data]}))
    command._warn_of_learned(run, rows, context("plain").display)
    said = "warning: 4 of 4 rows have the prompt of a row that was trained on (test.jsonl:1, "
    assert (said in capsys.readouterr().out) == here


def test_the_loss_alone_asks_nothing(job: Any) -> None:
    base, tuned = models()
    job(base, tuned, words="")
    assert base.asked == []
    assert scores(job)["models"]["Q4_K_M"].keys() == {"loss", "perplexity"}


def test_long_rows_have_no_loss(job: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps(chat("a", "1" * 300)) + "\n")
    base, _ = models()
    job(base, words="--context 200")
    assert "1 rows are longer than --context 200: their loss is not taken" in capsys.readouterr().out
    assert scores(job)["models"]["base"]["loss"]["rows"] == 3
    with pytest.raises(UserError, match="no row has an answer of at most --context 9 tokens"):
        job(base, words="--context 9")


def test_metrics_that_have_nothing_to_judge(job: Any, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    base, _ = models()
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"exact: no row of .* ends with an answer to compare with"):
        job(base)
    job(base, words="--regex 1")
    assert scores(job)["models"]["base"].keys() == {"regex"}
    with pytest.raises(UserError, match="so there is no loss"):
        job(base, words="")
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(UserError, match=r"regex: no row of .* has a prompt"):
        job(base, words="--regex 1")
    assert base.asked == ["a"]


# --- faults of the command line


def refused(*argv: object) -> UserError:
    with pytest.raises(UserError) as caught:
        command.run(parsed([str(word) for word in argv]), context(create=lambda: pytest.fail("nothing is loaded")))
    return caught.value


def test_faults_come_before_anything_is_loaded(tmp_path: Path) -> None:
    data, run = tmp_path / "test.jsonl", with_ggufs(tmp_path / "run", "Q4_K_M")
    data.write_text(json.dumps(chat("q", "a")) + "\n")
    assert refused(run).what == "No data is given."
    assert "--quant Q8_0" in refused(run, "--data", data, "--quant", "Q8_0").what
    assert "--with names no GGUF" in refused(run, "--data", data, "--quant", "Q4_K_M", "--with", "base").what
    assert "has no fused folder" in refused(run, "--data", data, "--with", "fused").what
    assert "a run has its own" in refused(run, "--data", data, "--chat-template", "gemma").what
    assert "has not finished training" in refused(write_run(tmp_path / "half", "interrupted"), "--data", data).what
    assert refused(tmp_path / "no", "--data", data).what == f"{tmp_path / 'no'}: no such run or model folder."
    assert refused("x.gguf", "--data", data).what == "x.gguf: no such file."
    gguf = run / "gguf" / "model-Q4_K_M.gguf"
    assert "--with: " in refused(gguf, "--data", data, "--with", "base").what
    assert "belongs to no run" in refused(gguf, "--data", data).what
    assert "is not a regular expression" in refused(run, "--data", data, "--regex", "(").what
    for words in (["--limit", "0"], ["--seed", "-1"], ["--max-tokens", "x"]):
        with pytest.raises(UserError, match=f"Argument {words[0]}: '{words[1]}' is not a number from"):
            parsed(["M", *words])

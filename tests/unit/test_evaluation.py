"""Figures with intervals, metrics against values computed by hand, rows of a test file, and the scorer of a user's."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backend import Adapter, LoraWeight
from common.data.batching import micro_batches
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.formats import read_row
from common.errors import UserError
from common.evaluation import metrics
from common.evaluation.answer_file import answer_file, key_of
from common.evaluation.bootstrap import Estimate, difference, estimate, mean, perplexity
from common.evaluation.losses import gguf_loss, grouped_losses
from common.evaluation.metrics import comparing, json_schema, regex
from common.evaluation.rows import JudgedRow, learned_rows, read_test, said
from common.evaluation.scorer import scorer
from common.training.validation import evaluate
from tests.tiny import chat
from tests.unit.bigram import LAYER, Bigram, plan, recipe, rows

# --- intervals


def ones(*values: float) -> np.ndarray:
    return np.array([(value, 1.0) for value in values])


def test_an_interval_is_that_of_the_normal_law_where_rows_are_many() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = estimate(ones(*values), mean, seed=0)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert found == estimate(ones(*values), mean, seed=0)
    assert found != estimate(ones(*values), mean, seed=1)


def test_a_loss_weighs_rows_by_their_label_tokens() -> None:
    found = estimate(np.array([(10.0, 5.0), (3.0, 1.0)]), mean, 0)
    assert (found.value, found.low, found.high) == (13 / 6, 2.0, 3.0)
    through = found.through(perplexity)
    assert through.value == pytest.approx(np.exp(13 / 6))
    assert through.interval == pytest.approx([np.exp(2), np.exp(3)])
    assert perplexity(10_000) == perplexity(709) < float("inf")


def test_a_difference_is_paired() -> None:
    """Rows that differ much from each other, and little from model to model: the difference is sure, the means not."""
    base = np.random.default_rng(2).normal(0, 10, 50)
    ours = base + np.random.default_rng(3).normal(1, 0.1, 50)
    found = difference(ones(*ours), ones(*base), mean, 0)
    assert found.low is not None
    assert found.high is not None
    assert 0.9 < found.low < found.value < found.high < 1.1
    spread = estimate(ones(*ours), mean, 0).interval
    assert spread[1] - spread[0] > 4


def test_a_single_row_has_no_interval() -> None:
    found = estimate(ones(0.5), mean, 0)
    assert (found.low, found.high, found.interval, f"{found:.2f}") == (None, None, [], "0.50")
    assert f"{Estimate(0.5, 0.25, 0.75, 9):.2f}" == "0.50 [0.25, 0.75]"


# --- losses


def test_losses_of_groups_sum_to_that_of_all_rows() -> None:
    backend, given = Bigram(), rows(300, seed=4)
    random = np.random.default_rng(5)
    weight = LoraWeight(random.normal(size=(2, 6)), random.normal(size=(6, 2)), 4.0)
    backend.load(recipe(), plan(), Path(), Adapter("", 1, 0.0, {LAYER: weight}))
    found = grouped_losses(backend, given, plan(), seed=0)
    assert found.shape == (200, 2)
    assert mean(found.sum(axis=0)) == pytest.approx(evaluate(backend, micro_batches(given, 64)))
    assert grouped_losses(backend, given[:3], plan(), 0).shape == (3, 2)


def test_the_loss_of_a_gguf_is_taken_over_labels_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.evaluation.losses._HELD", 6)  # two positions at a time
    asked = []

    def logits(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        asked.append(positions.tolist())
        return np.log(np.array([[0.2, 0.3, 0.5]], np.float32)).repeat(len(positions), axis=0) + 7

    weighted = Encoded(np.array([0, 1, 2, 0], np.int32), np.array([0, 1, 2, 0.5], np.float32), "x")

    class Model:
        vocabulary = 3
        __call__ = staticmethod(logits)

    found = gguf_loss(Model(), weighted)  # type: ignore[arg-type]
    assert found == pytest.approx((-np.log(0.3) - 2 * np.log(0.5) - 0.5 * np.log(0.2), 3.5), rel=1e-6)
    assert asked == [[0, 1], [2]]


# --- metrics


def judged(reference: str | None = None, raw: Any = None) -> JudgedRow:
    return JudgedRow("t.jsonl:1", raw, None, reference)


def figure(metric: metrics.Metric, *pairs: tuple[str, str]) -> float:
    """Of answers with their references."""
    found = np.array([metric.statistics(judged(reference), answer) for answer, reference in pairs], float)
    return metric.figure(found.sum(axis=0))


def test_exact_match_forgives_white_space_around() -> None:
    assert figure(comparing("exact"), (" yes\n", "yes"), ("Yes", "yes"), ("no", "yes"), ("", "yes")) == 0.25


def test_chrf_and_bleu_are_sacrebleus_corpus_scores() -> None:
    import sacrebleu

    answers = ["The cat sat on the mat.", "It rains in Kobe today, again.", "", "猫がマットに座った。"]
    references = ["The cat is on the mat.", "It rains in Kobe again today.", "No.", "猫はマットに座った。"]
    pairs = [*zip(answers, references, strict=True)]
    assert figure(comparing("chrf"), *pairs) == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)
    assert figure(comparing("bleu"), *pairs) == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)


def test_rouge_is_rouge_scores_and_counts_japanese_characters() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "The cat_sat, on 2 mats!", "A cat sat on the 2 big mats."
    theirs = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert figure(comparing("rouge"), (answer, reference)) == pytest.approx(100 * theirs)
    # of 5 and 5 characters 4 are in common, in one order
    assert figure(comparing("rouge"), ("猫が座った", "猫は座った")) == pytest.approx(80)


def test_a_regular_expression_is_found_anywhere() -> None:
    assert figure(regex(r"^\d+$"), ("12", ""), ("a 12", "")) == 0.5
    assert figure(regex(r"\d"), ("12", ""), ("a 12", "")) == 1
    with pytest.raises(UserError, match=r"--regex '\(' is not a regular expression of Python's: missing \)"):
        regex("(")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def schema_file(folder: Path, content: Any) -> Path:
    (folder / "s.json").write_text(json.dumps(content))
    return folder / "s.json"


def test_a_schema_judges_json_answers(tmp_path: Path) -> None:
    metric = json_schema(schema_file(tmp_path, SCHEMA))
    answers = ['{"n": 1}', ' {"n": 1}\n', '{"n": "1"}', '{"n": NaN}', "n: 1", '```json\n{"n": 1}\n```', "[" * 100_000]
    assert [metric.statistics(judged(), answer)[0] for answer in answers] == [1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"type": "nothing"}, "is not a JSON schema: type: 'nothing' is not valid"),
        ({"properties": {"a": {"pattern": "("}}}, "is not a JSON schema: properties/a/pattern"),
        ([1], "is not a JSON object"),
    ],
)
def test_a_bad_schema_is_named(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        json_schema(schema_file(tmp_path, content))


def test_a_schema_fetches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s\.json: no such file"):
        json_schema(tmp_path / "s.json")
    metric = json_schema(schema_file(tmp_path, {"$ref": "http://localhost:9/schema.json"}))
    with pytest.raises(UserError, match=r"a \$ref leads nowhere"):
        metric.statistics(judged(), "1")


@pytest.mark.parametrize(("name", "module"), [("chrf", "sacrebleu"), ("bleu", "sacrebleu"), ("rouge", "rouge-score")])
def test_a_missing_library_is_named_with_its_install_command(
    monkeypatch: pytest.MonkeyPatch, name: Any, module: str
) -> None:
    monkeypatch.setattr(metrics, "installed", lambda name: False)
    with pytest.raises(UserError, match=f"--metric {name} needs {module}, which is not installed") as caught:
        comparing(name)
    assert 'pip install "twintune[eval]"' in caught.value.fix
    with pytest.raises(UserError, match="--json-schema needs jsonschema, which is not installed"):
        json_schema(Path("s.json"))
    assert figure(comparing("exact"), ("a", "a")) == 1


# --- a scorer of the user's


def scorer_file(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_a_scorer_gets_the_row_as_its_file_has_it(tmp_path: Path) -> None:
    text = "def score(row, answer):\n    return answer == row.pop('expected')\n"
    metric, given = scorer(scorer_file(tmp_path, text)), {"prompt": "p", "expected": "a"}
    assert metric.statistics(judged(raw=given), "a") == (1.0, 1.0)
    assert metric.statistics(judged(raw=given), "b") == (0.0, 1.0)
    assert "expected" in given
    assert not metric.compares


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(row, answer):\n    x = 1\n    return x / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("def score(row):\n    return 1\n", "TypeError: score"),
    ],
)
def test_a_scorer_that_fails_names_the_row(tmp_path: Path, text: str, words: str) -> None:
    metric = scorer(scorer_file(tmp_path, text))
    with pytest.raises(UserError, match=rf"mine\.py: score\(\) failed on t\.jsonl:1: {words}") as caught:
        metric.statistics(judged(), "a")
    assert "the answers are kept" in caught.value.fix


@pytest.mark.parametrize("returned", ["numpy.bool_(True)", "numpy.float32(1)", "numpy.int64(1)"])
def test_a_score_may_be_numpys(tmp_path: Path, returned: str) -> None:
    metric = scorer(scorer_file(tmp_path, f"import numpy\ndef score(row, answer):\n    return {returned}\n"))
    assert metric.statistics(judged(), "a") == (1.0, 1.0)


@pytest.mark.parametrize("returned", ["None", "'good'", "float('nan')"])
def test_a_scorer_returns_a_number(tmp_path: Path, returned: str) -> None:
    metric = scorer(scorer_file(tmp_path, f"def score(row, answer):\n    return {returned}\n"))
    with pytest.raises(UserError, match=r"returned (None|'good'|nan) for t\.jsonl:1, which is not a number"):
        metric.statistics(judged(), "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("score = 1\n", "has no function score"),
        ("def score(row, answer)\n", "cannot be loaded: line 1: SyntaxError"),
        ("\nimport no_such_module\n", "cannot be loaded: line 2: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_scorer(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scorer(scorer_file(tmp_path, text))


def test_a_scorer_may_define_dataclasses(tmp_path: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    a: int\n"
    assert scorer(scorer_file(tmp_path, text + "def score(row, answer):\n    return A(2).a\n")).statistics(
        judged(), ""
    ) == (2.0, 1.0)
    sys.modules.pop("scorer_mine")
    with pytest.raises(UserError, match=r"no\.py: no such Python file"):
        scorer(tmp_path / "no.py")


# --- rows


@pytest.fixture
def encoder(tokenizer_folder: Path) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_folder), MaskingOptions())


def test_file(folder: Path, *lines: Any) -> Path:
    path = folder / "test.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


test_file.__test__ = False  # type: ignore[attr-defined]


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * 3
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def test_the_last_turn_is_judged_given_all_before_it(tmp_path: Path, encoder: Encoder) -> None:
    one, two = read_test(test_file(tmp_path, turns("a", "b", "c", "d"), turns("a", "b", "c")), encoder, None)
    assert one.prompt is not None
    assert two.prompt is not None
    assert [m["content"] for m in one.prompt.messages] == ["a", "b", "c"]
    assert (one.reference, one.source) == ("d", "test.jsonl:1")
    assert one.encoded is not None
    assert one.encoded.label_tokens == 4  # both answers with their ends, as in training
    assert [m["content"] for m in two.prompt.messages] == ["a", "b", "c"]
    assert two.reference is None
    assert two.encoded is not None
    assert two.encoded.label_tokens == 2


def test_rows_with_the_prompt_of_a_trained_one_are_found(tmp_path: Path, encoder: Encoder) -> None:
    rows = read_test(test_file(tmp_path, turns("a", "b"), turns("c", "d"), {"text": "plain"}), encoder, None)
    trained = [read_row(row, "train.jsonl:1", {})[1] for row in (turns("c", "other"), {"text": "plain"})]
    assert learned_rows(rows, trained) == ["test.jsonl:2"]


@pytest.mark.parametrize(
    ("raw", "prompt", "reference", "labels"),
    [
        ({"prompt": "p"}, ["p"], None, None),
        ({"prompt": "p", "completion": ""}, ["p"], None, None),
        ({"prompt": "p", "completion": "c", "expected": 3}, ["p"], "c", 2),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ["p"], None, None),
        ({"text": "plain"}, None, None, 5),
        (turns("q", "<think>\nso\n</think>\n\nyes"), ["q"], "yes", 4),
        ({**turns("q", "no"), "train": False}, ["q"], None, None),
    ],
)
def test_rows_of_every_shape(
    tmp_path: Path, encoder: Encoder, raw: Any, prompt: Any, reference: str | None, labels: int | None
) -> None:
    (found,) = read_test(test_file(tmp_path, raw), encoder, None)
    assert (None if found.prompt is None else [m["content"] for m in found.prompt.messages]) == prompt
    assert found.reference == reference
    assert (None if found.encoded is None else found.encoded.label_tokens) == labels
    assert found.raw == raw


@pytest.mark.parametrize("answer", [{"mine": "yes"}, {}])
def test_rows_are_read_as_field_says(tmp_path: Path, encoder: Encoder, answer: dict[str, str]) -> None:
    path = test_file(tmp_path, {"asked": "q", "question": "other"} | answer)
    (found,) = read_test(path, encoder, None, {"prompt": "asked", "completion": "mine"})
    assert found.prompt is not None
    assert [m["content"] for m in found.prompt.messages] == ["q"]
    assert found.reference == answer.get("mine")
    (found,) = read_test(path, encoder, None, {"instruction": "asked", "output": "mine"})  # Alpaca's names of the same
    assert found.reference == answer.get("mine")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    "</call>{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_tool_call_is_expected_as_the_template_writes_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = TOOLS
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    raw = {
        "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "tools": [tool],
    }
    path = test_file(tmp_path, raw)
    (found,) = read_test(path, Encoder(tokenizer, MaskingOptions()), None)
    assert found.reference == '<call>add {"a": 1}</call>'
    assert found.prompt is not None
    assert found.prompt.tools == (tool,)
    (without,) = read_test(path, None, None)
    assert (without.reference, without.encoded) == (None, None)


def test_tokens_that_no_answer_has_are_not_expected(tmp_path: Path, tokenizer_folder: Path) -> None:
    """As [TOOL_CALLS] of Mistral; and Harmony's name of a channel is a part of each answer."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "<|channel|>"]}, False)
    tokenizer.chat_template = TOOLS.replace(
        "{% else %}{{", "{% else %}{{ '<|channel|>final ' * (m.role == 'assistant') +"
    )
    call = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    path = test_file(tmp_path, call, turns("q", "<think>\nso\n</think>\n\nyes"))
    called, answered = read_test(path, Encoder(tokenizer, MaskingOptions()), None)
    assert (called.reference, answered.reference) == ('add {"a": 1}</call>', "final yes")


@pytest.mark.parametrize("answer", ["<|channel>thought\nr2\n<channel|>Two.", "<think>\nr2\n</think>\n\nTwo.", "Two."])
def test_what_an_answer_says_is_behind_its_reasoning(answer: str) -> None:
    assert said(answer) == "Two."
    assert said(answer.partition("r2")[0].partition("Two.")[0]) == ""


def test_faulty_rows_are_named(tmp_path: Path, encoder: Encoder) -> None:
    path = test_file(tmp_path, chat("q", "a"), "{", {"x": 1}, chat("q", "a<|im_end|>b"), {"messages": []})
    with pytest.raises(UserError) as caught:
        read_test(path, encoder, None)
    lines = caught.value.what.splitlines()
    assert lines[0] == f"--data {path} has 4 bad rows:"
    assert lines[1].startswith("test.jsonl line 2: is not JSON")
    assert lines[2].startswith("test.jsonl line 3: has none of messages")
    assert "test.jsonl:4: this row cannot be labeled exactly" in lines[3]
    assert len(read_test(path, encoder, 1)) == 1
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty: it holds no rows"):
        read_test(path, encoder, None)
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        read_test(tmp_path / "no.jsonl", encoder, None)


# --- answers that are kept


def test_answers_are_kept_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "base.jsonl"
    with answer_file(path) as kept:
        kept.add(key_of("a"), {"answer": "港"})
        with pytest.raises(UserError, match="Another process is writing"), answer_file(path):
            pass
    path.write_bytes(path.read_bytes() + b'{"key": "x", "ans')
    with answer_file(path) as kept:
        assert kept.get(key_of("a")) == {"answer": "港"}
        assert kept.get(key_of("b")) is None
        kept.add("b", {"loss": float("nan")})
    assert len(path.read_bytes().splitlines()) == 2


def test_a_key_is_made_of_any_path_and_stays() -> None:
    assert key_of("港", 1) == "5a95d728610513c2e3ab2b4e10136b29"
    assert key_of(os.fsdecode(b"caf\xe9")) != key_of(os.fsdecode(b"caf\xe8"))


@pytest.mark.parametrize(("line", "words"), [("{", "line 1 is not JSON"), ('{"a": 1}', "line 1 has no key")])
def test_a_damaged_file_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "base.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=words), answer_file(path):
        pass

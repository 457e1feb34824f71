"""The page of a run: what it says, what it leaves out, and that nothing on it is executed or fetched."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.commands.compare import compare
from common.commands.train import run_training
from common.data.dataset import Example
from common.data.encode import Encoded
from common.data.summary import row_record
from common.data.text_sample import scripts_of
from common.display import Display
from common.errors import UserError
from common.options import Options
from common.report import page as module
from common.report import sections
from common.report.charts import MOST_POINTS
from common.report.comparison import distinct_names
from common.report.kept import read_kept
from common.report.page import write_report
from common.report.run_charts import run_charts, speeds
from common.report.texts import LANGS, texts
from common.run_record import Run
from tests.contexts import context
from tests.report_run import metrics, write_run
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
TEXTS = (
    *("the prompt's words", "the row's answer", "an answer at", "what is read", "what is learned"),
    *("a row's own words", "a prompt of the user", "quoted words", "an answer of the GGUF"),
)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def written(folder: Path, **settings: Any) -> Elements:
    return Elements(write_report(Run(folder), **settings).read_text(encoding="utf-8"))


# --- words


def test_both_languages_have_the_same_texts_with_the_same_figures() -> None:
    english, japanese = texts("en"), texts("ja")
    assert english.keys() == japanese.keys()
    for key, text in english.items():
        assert text, key
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", japanese[key])), key
    japanese_kinds = {key for key, text in japanese.items() if re.search(r"[ぁ-んァ-ン一-龥]", text)}
    assert len(japanese_kinds) > 0.9 * len(japanese)


@pytest.mark.parametrize("lang", LANGS)
def test_the_page_says_what_came_of_the_run(tmp_path: Path, lang: Any) -> None:
    page = written(write_run(tmp_path / "run"), lang=lang)
    assert page.all("html") == [{"lang": lang}]
    figures = ("4.5", "0.11", "97.6%", "200", "0.95 GB", "1.00 GB", "0.11 GB", "0.15 GB", "6.17", "0.00400", "98.0%")
    for said in (*figures, *TEXTS[:7], "--rank 4", "--rslora", "'my rows.jsonl'", "3.11.7", "no GPU", "f00d", "cafe"):
        assert said in page.words, said
    assert page.words.count("Q4_K_M") > 2
    assert texts(lang)["verdict.sound.text"] in page.words
    japanese = ("ラテン文字", "プロセッサ", "メモリ")
    assert all(said in page.words for said in (japanese if lang == "ja" else ("Latin", "processor", "memory")))


def test_every_chart_says_in_words_what_it_shows(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run"))
    charts = [one for one in page.all("div") if one.get("class") == "chart"]
    assert [str(one["id"]).removeprefix("chart-") for one in charts] == [
        *("loss", "rate", "norm", "speed", "memory", "swap", "lengths", "scripts", "sizes", "kl")
    ]
    assert all(one["role"] == "img" and one["aria-label"] for one in charts)
    assert charts[0]["aria-label"] == (
        "Loss. training: 4 at step 1, lowest 0.1 at step 40, highest 4 at step 1, 0.1 at step 40. validation: 4.5 at "
        "step 0, lowest 0.11 at step 40, highest 4.5 at step 0, 0.11 at step 40. base model: 4.5."
    )
    assert "estimated peak: 1.00 GB. budget: 2.00 GB" in str(charts[4]["aria-label"])
    assert "Most rows (60) have 40 to 49 tokens" in str(charts[6]["aria-label"])
    assert all(one.get("scope") in ("col", "row") for one in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_a_speed_is_that_of_steps_after_the_first(tmp_path: Path) -> None:
    found = speeds(read_kept(Run(write_run(tmp_path / "run", steps=3))))
    assert found == [(2, 200.0), (3, 200.0)]


# --- nothing is executed, nothing is fetched


def test_what_a_stranger_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run", hostile=HOSTILE))
    assert len(page.scripts) == 3
    assert page.all("img") == []
    assert page.words.count("<img src=x onerror=alert(2)>\"'&{{ 7*7 }}") > 10
    assert not [key for _, attributes in page.found for key in attributes if key.startswith("on")]
    assert json.loads(page.scripts[0]).keys() >= {"loss", "kl"}


def test_text_that_would_be_written_backwards_is_shown_as_its_code(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run", hostile="\u202ebackwards"))
    assert "\u202e" not in page.words
    assert page.words.count("\\u202ebackwards") > 10


def test_a_long_row_shows_its_labels_and_where_it_is_cut() -> None:
    turns = [(False, "p" * 5000), (True, "l" * 9000)] * 30
    ids = np.concatenate([np.full(len(text), ord(text[0]), np.int32) for _, text in turns])

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    parts = row_record(Encoded(ids, ids == ord("l"), "rows.jsonl:1"), Letters()).parts
    assert [label for label, _ in parts] == [*([False, True] * 10), False, *([False, True] * 10)]
    assert parts[0][1] == f"{'p' * 500} […] {'p' * 500}"
    assert parts[1][1] == f"{'l' * 1000} […] {'l' * 1000}"
    assert parts[20][1].strip() == "[…]"


def test_the_policy_allows_the_pages_two_scripts_and_no_network(tmp_path: Path) -> None:
    page = written(write_run(tmp_path / "run"))
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in page.scripts[1:]]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    assert rules["script-src"] == " ".join(f"'sha256-{one}'" for one in hashes)
    links = [one.get("href") or one.get("src") for _, one in page.found if "href" in one or "src" in one]
    assert links == ["#main"]


@pytest.mark.slow
def test_the_page_is_small_however_long_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20_000)
    assert write_report(Run(run)).stat().st_size < 1_500_000
    layers = run_charts(read_kept(Run(run)), texts("en"))["loss"].spec["layer"]
    shown = [value["x"] for value in layers[0]["data"]["values"]]
    assert len(shown) == MOST_POINTS
    assert (shown[0], shown[-1]) == (1, 20_000)


# --- what is left out


def test_without_texts_there_are_only_figures(tmp_path: Path) -> None:
    html = write_report(Run(write_run(tmp_path / "run")), texts_shown=False).read_text(encoding="utf-8")
    assert [text for text in TEXTS if text in html.replace("&#39;", "'")] == []
    assert "best at step 40" in html


def test_a_run_that_was_trained_without_texts_shows_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", options={"model": "some/base", "no_text": True})
    html = write_report(Run(run)).read_text(encoding="utf-8").replace("&#39;", "'")
    assert [text for text in TEXTS if text in html] == []


def test_of_a_run_that_kept_next_to_nothing_the_rest_is_shown(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.update(status="interrupted", recipe_hash="ab", model_hash="cd", options={"model": "some/base"}, stop_ids=[])
    page = written(run.path)
    assert "No step has been recorded yet." in page.words
    assert "some/base" in page.words
    assert "None" not in page.words
    assert [one for one in page.all("div") if one.get("class") == "chart"] == []


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.yaml", "metrics.jsonl", "samples.jsonl", "environment.json"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\xff\x00{",
        b'{"step": "1", "loss": []}\n{"step": 1, "loss": NaN, "memory": 1e999, "tokens": 9, "seconds": 1e-999}\n[]\n',
    ],
)
@pytest.mark.slow
def test_a_file_that_is_missing_or_damaged_costs_its_own_part(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert "some/base" in written(run).words


def test_a_number_beyond_all_numbers_is_an_error(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run"))
    facts = json.loads(run.report_facts.read_text())
    facts["data"]["scripts"] = {"Latin": 10**400}
    run.report_facts.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds a number that is too large"):
        write_report(run)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report(Run(tmp_path))


# --- how a run is repeated


def test_the_command_holds_what_is_not_a_default(tmp_path: Path) -> None:
    options = {"model": "a model", "data": ["x.jsonl", "y"], "weights": [1.0, 2.0], "rank": 16, "shard": False}
    options |= {"rank_pattern": {"q_proj": 3}, "output": "runs/x", "push": "me/x", "steps": None, "rslora": True}
    run = write_run(tmp_path / "run", options=options)
    shown = sections.command(read_kept(Run(run))).replace(" \\\n   ", "").split(" train")[1]
    assert sorted(shown.split(" --")) == sorted(
        ["", "model 'a model'", "data x.jsonl y", "shard false", "rank-pattern q_proj=3", "weights 1.0 2.0", "rslora"]
    )


# --- train writes it


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "data": str(write_rows(tmp_path / "rows.jsonl")),
        "output": str(tmp_path / "run"),
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "rank": 2,
        "steps": 6,
        "eval_every": 3,
    }


def train(given: dict[str, Any], backend: Bigram | None = None) -> Path:
    return run_training(Options.model_validate(given), context(create=lambda: backend or Bigram()))


def test_train_writes_the_page_in_the_language_that_was_asked_for(given: dict[str, Any]) -> None:
    run = train(given | {"lang": "ja"})
    page = Elements((run / "report.html").read_text(encoding="utf-8"))
    assert page.all("html") == [{"lang": "ja"}]
    assert "学習レポート" in page.words
    kept = Run(run).read_report_facts()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(kept.data.counts) == kept.data.parts["train"].rows == Run(run).record.data.train_rows
    assert kept.data.parts["train"].label_tokens == Run(run).record.data.label_tokens
    assert kept.reasons["backend"] == "asked for"
    assert len(kept.data.rows) == 3
    labels = "".join(text for label, text in kept.data.rows[0].parts if label)
    assert labels.endswith("<|im_end|>")
    assert len(labels) < sum(len(text) for _, text in kept.data.rows[0].parts)
    specs = json.loads(page.scripts[0])
    assert len(specs["loss"]["layer"][0]["data"]["values"]) == sum("loss" in line for line in lines) == 6


def test_with_no_text_train_keeps_no_row(given: dict[str, Any]) -> None:
    run = train(given | {"no_text": True})
    assert Run(run).read_report_facts().data.rows == []
    assert "<mark>" not in (run / "report.html").read_text(encoding="utf-8")


def test_no_text_on_resume_takes_the_rows_back(given: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(given | {"save_every": 2}, Fails())
    page = Path(given["output"]) / "report.html"
    assert "<mark>" in page.read_text(encoding="utf-8")
    train({"resume": given["output"], "no_text": True, "lang": "ja"})
    text = page.read_text(encoding="utf-8")
    assert "<mark>" not in text
    assert 'class="sample"' not in text
    assert '<html lang="ja"' in text
    assert Run(page.parent).read_report_facts().data.rows == []


class Fails(Bigram):
    def train_step(self, micro_batches: Any, learning_rate: float, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return super().train_step(micro_batches, learning_rate, step)


def test_a_run_that_was_cut_short_has_its_page_too(given: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(given, Fails())
    page = Elements((Path(given["output"]) / "report.html").read_text(encoding="utf-8"))
    assert "interrupted" in page.words
    assert "of 6" in page.words


def test_a_page_that_cannot_be_written_is_a_warning(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*given: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_page", fails)
    run = train(given)
    assert "warning: no report.html: OSError" in capsys.readouterr().err
    assert Run(run).record.status == "complete"


# --- compare


def test_compare_writes_both_runs_curves_and_whether_they_compare(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"base-{name}", steps) for name, steps in (("mac", 20), ("cuda", 30))]
    compare(runs, Display("quiet"), tmp_path / "c.html")
    page = Elements((tmp_path / "c.html").read_text(encoding="utf-8"))
    specs = json.loads(page.scripts[0])
    assert [len(layer["data"]["values"]) for layer in specs["loss"]["layer"]] == [20, 30]
    assert [bar["x"] for bar in specs["peaks"]["data"]["values"]] == ["base-mac", "base-cuda"]
    assert "NOT the same recipe as base-mac" in page.words
    assert "200.0  (1.00x)" in page.words
    assert [text for text in TEXTS if text in page.words] == []


def test_runs_of_one_name_have_one_other_name_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("mac", "cuda"):
        (tmp_path / place).mkdir()
        write_run(tmp_path / place / "run", 20)
    monkeypatch.chdir(tmp_path / "mac" / "run")
    compare([Path("."), Path("../../cuda/run")], Display("json"), tmp_path / "c.html")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["mac/run", "cuda/run"]
    assert next(event["columns"] for event in events if event["event"] == "table") == ["", *names]
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert note.startswith("cuda/run: the same recipe as mac/run: ")
    page = Elements((tmp_path / "c.html").read_text(encoding="utf-8"))
    specs = json.loads(page.scripts[0])
    assert [bar["x"] for bar in specs["peaks"]["data"]["values"]] == names
    assert "cuda/run: the same recipe as mac/run: " in page.words


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["/a/one", "/a/two"], ["one", "two"]),
        (["/a/run", "/b/run", "/c/other"], ["a/run", "b/run", "other"]),
        (["/x/a/run", "/y/a/run"], ["x/a/run", "y/a/run"]),
        (["/run", "/a/run"], ["/run", "a/run"]),
        (["/a/run", "/a/run/../run", "/b/run"], ["a/run (1)", "a/run (2)", "b/run"]),
        (["/a/run", "/b/run", "/a/run"], ["a/run (1)", "b/run", "a/run (3)"]),
    ],
)
def test_names_tell_runs_apart(runs: list[str], names: list[str]) -> None:
    assert distinct_names([Path(run) for run in runs]) == names


# --- what is kept of the data


def test_scripts_are_those_of_the_answers() -> None:
    rows = [
        Example(messages=[{"role": "assistant", "content": text}], source="x")
        for text in ("a plain answer", "はい、そうです。")
    ]
    assert scripts_of([*rows, rows[0]], 0) == {"Latin": 2, "Japanese": 1}


def test_the_fabricated_metrics_are_those_of_a_run(given: dict[str, Any]) -> None:
    """So that the other tests of the page mean something."""
    lines = [json.loads(line) for line in (train(given) / "metrics.jsonl").read_text().splitlines()]
    assert next(line.keys() for line in lines if "loss" in line) == metrics(1)[1].keys()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            metrics(3),
            "Training loss went from 4 to 1.333. The base model's validation loss is 4.5; no other validation",
        ),
        (metrics(3)[1:], "Training loss went from 4 to 1.333; there were no validation rows."),
        (metrics(10), "Validation loss fell from 4.5 to 0.44, 90.2% lower than the base model's."),
    ],
)
def test_the_headline_of_a_training_that_goes_on(lines: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", status="training", start_valid_loss=None))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sections.headline(read_kept(run), texts("en")).startswith(said)


def test_the_best_validation_is_the_one_that_training_chose(tmp_path: Path) -> None:
    """A later loss is lower by less than --min-delta: the adapter of the step before it is exported."""
    run = Run(write_run(tmp_path / "run"))
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 50, "valid_loss": 4.4 / 40 * 0.999}) + "\n")
    run.write_recipe(run.recipe.model_copy(update={"min_delta": 0.002}))
    for record in ({"best_step": 40, "best_valid_loss": 4.4 / 40}, {"best_step": None, "best_valid_loss": None}):
        run.update(**record)
        assert sections._best(read_kept(run)) == (40, 4.4 / 40)

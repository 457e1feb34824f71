"""Several sources of data in one training: their shares, names, splits and faults."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.commands.check_data import check_data
from common.commands.prepare import Job, prepare
from common.commands.train import run_training
from common.data import load, row_parts
from common.data.dataset import Dataset
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import rows_hash
from common.data.facts import data_hash, sources_of
from common.data.findings import quality_warnings
from common.data.mixed_rows import MixedRows
from common.data.sources import data_of, read_sources
from common.data.training_rows import load as load_rows
from common.display import Display
from common.errors import UserError
from common.option_sources import load_options
from common.options import Options
from common.paths import sources_name
from common.run_record import Run
from tests.contexts import context
from tests.tiny import chat
from tests.unit.bigram import Bigram
from tests.unit.test_load import hub


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(row_parts, "processes", lambda: 1)
    monkeypatch.chdir(tmp_path)


def write(name: str, count: int, word: str) -> str:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    rows = [chat(f"{word} {number}?", f"{word} answer {number}.") for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def mixed(*sources: str, **settings: Any) -> Dataset:
    return read_sources(Options.model_validate({"data": [*sources], "valid_share": 0.0} | settings))


def counts(data: Dataset, name: str) -> list[int]:
    """How often each row of the file stands in an epoch, most often first."""
    found = Counter(source for source in sources_of(data.train) if source.rpartition(":")[0] == name)
    return sorted(found.values(), reverse=True)


def test_without_weights_all_rows_are_used() -> None:
    data = mixed(write("a.jsonl", 8, "a"), write("b.jsonl", 5, "b"))
    assert [row.source for row in data.train] == [
        *(f"a.jsonl:{n}" for n in range(1, 9)),
        *(f"b.jsonl:{n}" for n in range(1, 6)),
    ]
    assert list(sources_of(data.train)) == [row.source for row in data.train]
    assert data.mix == ["a.jsonl: 8 rows x 1", "b.jsonl: 5 rows x 1"]
    assert data.described() == "messages, 13 rows"


@pytest.mark.parametrize(
    ("weights", "rows"),
    [
        ([2, 1], ([2] * 8 + [1] * 22, [1] * 19)),  # 38 and 19 of 57 rows
        ([1, 1], ([1] * 28, [2] + [1] * 26)),
        ([0.1, 9.9], ([1], [3, 3] + [2] * 25)),
        ([1, 1e6], ([1], [3] * 3 + [2] * 24)),
    ],
)
def test_a_source_has_its_share(weights: list[float], rows: tuple[list[int], list[int]]) -> None:
    data = mixed(write("a.jsonl", 30, "a"), write("b.jsonl", 27, "b"), weights=weights)
    assert (counts(data, "a.jsonl"), counts(data, "b.jsonl")) == rows
    assert len(data.train) == sum(map(sum, rows))
    assert list(sources_of(data.train)) == [row.source for row in data.train]
    assert [data.train[at].source for at in (0, -1)] == [data.train.sources[0], data.train.sources[len(data.train) - 1]]


def test_what_is_drawn_is_decided_by_the_seed_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"data": [write("a.jsonl", 400, "a"), write("b.jsonl", 300, "b")], "weights": [3, 1], "valid_share": 0.0}
    one, again, other = (read_sources(Options.model_validate(given | {"seed": seed})) for seed in (1, 1, 2))
    assert data_hash(one) == data_hash(again) != data_hash(other)
    load_rows(Options.model_validate(given), Display("plain"))
    out = capsys.readouterr().out
    assert "a.jsonl + b.jsonl read as: messages, 700 rows" in out
    assert "training rows of an epoch: a.jsonl: 400 rows x 1.31, b.jsonl: 300 rows x 0.583" in out


def test_weights_and_order_of_sources_are_in_the_hash() -> None:
    a, b = write("a.jsonl", 8, "a"), write("b.jsonl", 5, "b")
    hashes = [
        data_hash(data)
        for data in (mixed(a, b), mixed(b, a), mixed(a, b, weights=[2, 1]), mixed(a, b, weights=[4, 2]), mixed(a))
    ]
    assert hashes[2] == hashes[3]
    assert len(set(hashes)) == 4


def test_each_source_has_a_validation_of_its_own() -> None:
    a, b = write("a.jsonl", 40, "a"), write("b.jsonl", 20, "b")
    write("c/train.jsonl", 10, "c")
    write("c/valid.jsonl", 3, "d")
    write("c/test.jsonl", 2, "e")
    data = mixed(a, b, "c", valid_share=0.1)
    assert Counter(source.partition(":")[0] for source in sources_of(data.valid)) == {
        "a.jsonl": 4,
        "b.jsonl": 2,
        "c/valid.jsonl": 3,
    }
    assert [row.source for row in data.test] == ["c/test.jsonl:1", "c/test.jsonl:2"]
    assert len(data.train) == 36 + 18 + 10
    heavy = mixed(a, b, "c", valid_share=0.1, weights=[1, 1, 8])
    assert len(heavy.train) == 6 + 6 + 51
    assert list(sources_of(heavy.valid)) == list(sources_of(data.valid))


def test_files_of_one_name_are_told_apart() -> None:
    write("x/rows.jsonl", 1, "a")
    write("y/rows.jsonl", 1, "b")
    assert [row.source for row in mixed("x/rows.jsonl", "y/rows.jsonl").train] == ["x/rows.jsonl:1", "y/rows.jsonl:1"]
    for name in ("x/data", "y/data"):
        Path(name).mkdir()
        write(f"{name}/train.jsonl", 1, name)
    assert [row.source for row in mixed("x/data", "y/data").train] == ["x/data/train.jsonl:1", "y/data/train.jsonl:1"]


def test_formats_files_and_a_hub_data_set_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"train": [{"instruction": "Hi", "output": "Yo"}]})
    Path("b.txt").write_text("Once upon a time.")
    data = mixed(write("a.jsonl", 1, "a"), "b.txt", "owner/name")
    assert [row.source for row in data.train] == ["a.jsonl:1", "b.txt:1", "owner/name/train:1"]
    assert data.formats == {"messages": 1, "plain text": 1, "Alpaca": 1}


def test_a_field_is_looked_for_in_every_source() -> None:
    Path("a.csv").write_text("ask,completion\nHi,Yo\n")
    Path("b.csv").write_text("ask,completion,note\nHo,Yo,x\n")
    data = mixed("a.csv", "b.csv", field=["prompt=ask"])
    assert [row.messages[0]["content"] for row in data.train] == ["Hi", "Ho"]
    assert data.unread == {"b.csv": ["note"]}
    Path("b.csv").write_text("question,answer\nHo,Yo\n")
    with pytest.raises(UserError, match=r"--field prompt=ask: b\.csv has no such column"):
        mixed("a.csv", "b.csv", field=["prompt=ask"])


@pytest.mark.parametrize("large", [False, True])
def test_mixed_rows_are_encoded_once_and_in_order(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    encoder = Encoder(load_tokenizer(tokenizer_folder), MaskingOptions())
    a, b = write("a.jsonl", 30, "a"), write("b.jsonl", 27, "b")
    with Path(b).open("a") as file:
        file.write(json.dumps(chat("Bad", "a<|im_end|>b")) + "\n{\n" + json.dumps(chat("Hi", "Last")) + "\n")
    monkeypatch.setattr(load, "LARGE", 1 if large else 1 << 40)
    data = mixed(a, b, weights=[1, 3], valid_share=0.2, on_bad_row="drop")
    (train, valid), bad = encode_parts((data.train, data.valid), encoder, "drop")
    assert (len(bad), len(data.bad)) == (1, 1)
    for rows, encoded in ((data.train, train), (data.valid, valid)):
        good = [row for row in rows if row.source != "b.jsonl:28"]
        assert [row.source for row in encoded] == [row.source for row in good]
        assert [row.ids.tolist() for row in encoded] == [encoder(row).ids.tolist() for row in good]
    assert isinstance(data.train, MixedRows)
    held = [len(part) for part in data.train.parts]
    assert len(train.store.lengths) <= sum(held) + len(data.valid)
    assert len(train) > len(np.unique(train.rows))
    monkeypatch.setattr(load, "LARGE", 1 << 40 if large else 1)
    other = mixed(a, b, weights=[1, 3], valid_share=0.2, on_bad_row="drop")
    assert data_hash(other) == data_hash(data)
    (again, _), _ = encode_parts((other.train, other.valid), encoder, "drop")
    assert rows_hash(again) == rows_hash(train)


def test_leakage_across_sources_is_found_and_drawn_rows_are_no_repeats() -> None:
    write("a/train.jsonl", 20, "same")
    write("b/train.jsonl", 5, "b")
    write("b/valid.jsonl", 3, "same")
    data = mixed("a", "b", weights=[1, 9])
    assert max(counts(data, "b/train.jsonl")) > 1
    leaked = [row.source for row in data.valid if f"a/train.jsonl:{row.source[-1]}" in set(sources_of(data.train))]
    found = {warning.what: warning.sources for warning in quality_warnings(mixed("a", "b"))}
    assert found == {
        "validation or test rows that are in training too": [f"b/valid.jsonl:{number}" for number in (1, 2, 3)]
    }
    drawn = {warning.what: warning.sources for warning in quality_warnings(data)}
    assert drawn.get("validation or test rows that are in training too", []) == leaked


# --- options


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (
            {"data": ["a.jsonl"], "weights": ["2"]},
            "weights are for several sources of data, and there is one",
        ),
        (
            {"data": ["a.jsonl", "b.jsonl"], "weights": ["2", "1", "1"]},
            "weights: 3 numbers for 2 sources of data: give one for each",
        ),
        (
            {"data": ["a.jsonl", "b.jsonl"], "weights": ["2", "0"]},
            "weights: 0 must be above 0; leave out a source that is not wanted",
        ),
        ({"data": ["a.jsonl", "b.jsonl"], "weights": ["2", "-1"]}, "weights: -1 must be above 0"),
        ({"data": ["a.jsonl", "b.jsonl"], "weights": ["2", "nan"]}, "--weights: Input should be a finite number"),
        ({"data": ["a.jsonl", "b.jsonl"], "weights": ["2", "x"]}, "--weights: Input should be a valid number"),
        ({"data": ["a.jsonl", "b.jsonl", "a.jsonl"]}, "data: a.jsonl is given twice: to count its rows more"),
        ({"data": ["a.jsonl", "b\0.jsonl"]}, "--data: is not a path"),
        (
            {"data": ["x", "y"], "valid_share": "0.2"},
            "--valid-share is for one file, and all sources are folders",
        ),
    ],
)
def test_faults(flags: dict[str, Any], fault: str) -> None:
    for name in ("x", "y"):
        Path(name).mkdir()
    with pytest.raises(UserError) as caught:
        load_options(flags)
    assert fault in caught.value.what


def test_a_source_under_two_names() -> None:
    write("a.jsonl", 2, "a")
    with pytest.raises(UserError) as caught:
        mixed("a.jsonl", "./a.jsonl")
    assert caught.value.what == "--data a.jsonl ./a.jsonl: the same rows twice."
    assert caught.value.fix == "To count them more, give a weight."


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--data b\.jsonl: no such file or folder"):
        mixed(write("a.jsonl", 2, "a"), "b.jsonl")


@pytest.mark.parametrize(
    ("text", "data", "weights"),
    [
        ("data: a.jsonl\n", ["a.jsonl"], []),
        ("data: [a.jsonl, b.jsonl]\nweights: [2, 1.5]\n", ["a.jsonl", "b.jsonl"], [2, 1.5]),
        ("data: [a.jsonl, b.jsonl]\nweights: 2 1\n", ["a.jsonl", "b.jsonl"], [2, 1]),
    ],
)
def test_sources_in_yaml_are_found_from_its_folder(text: str, data: list[str], weights: list[float]) -> None:
    Path("there").mkdir()
    for name in data:
        write(f"there/{name}", 1, "a")
    Path("there/c.yaml").write_text(text)
    options = load_options({"config": "there/c.yaml"})[0]
    assert (options.data, options.weights) == ([f"there/{name}" for name in data], weights)


def test_the_name_of_a_run() -> None:
    assert sources_name(["x/a.jsonl"]) == "a"
    assert sources_name(["x/a.jsonl", "o/b:c@1"]) == "a-b"
    assert sources_name(["x/a.jsonl", "b", "c", "d"]) == "a-and-3-more"


# --- commands


def ready(given: dict[str, Any]) -> Job:
    return prepare(Options.model_validate(given), None, context())


def test_a_mixed_run_is_resumed_from_another_folder_and_read_again(tiny_llama: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model": str(tiny_llama),
        "data": [write("a.jsonl", 20, "a"), write("b.jsonl", 10, "b")],
        "weights": [2, 1],
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
        "export": "none",
        "steps": 4,
        "output": str(tmp_path / "run"),
    }
    assert ready(given | {"output": None}).run.path == Path("runs/tiny-llama-a-b-torch")
    folder = run_training(Options.model_validate(given), context(create=Bigram))
    run = Run(folder)
    assert run.record.options["data"] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert (run.recipe.data, run.recipe.weights) == ("a.jsonl + b.jsonl", [2, 1])
    assert run.record.data.train_rows == 27
    (tmp_path / "else").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "else")
        run_training(Options.model_validate({"resume": str(folder), "steps": 6}), context(create=Bigram))
        assert Run(folder).recipe.data_hash == run.recipe.data_hash
        options = Options.model_validate(Run(folder).record.options)
        assert len(data_of(Run(folder), options).train) == 27
        write(str(tmp_path / "b.jsonl"), 11, "c")
        with pytest.raises(UserError, match="is not the data that"):
            data_of(Run(folder), options)


def test_check_data_takes_several(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "data": [write("a.jsonl", 90, "a"), write("b.jsonl", 60, "b")],
        "model": str(tiny_llama),
        "weights": [1, 9],
    }
    check_data(Options.model_validate(given | {"valid_share": 0.0}), None, Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    table = next(event for event in events if event["event"] == "table")
    assert table["title"].startswith("a.jsonl + b.jsonl by ")
    assert table["rows"][0][:2] == ["train", "150"]
    assert (events[-1]["event"], events[-1]["rows"]) == ("verdict", 75)  # each drawn row once: 15 of a, 60 of b
    assert [advice["what"] for advice in events[-1]["advice"] if "repeat" in advice["what"]] == []


def test_old_and_new_records_name_their_data_sets() -> None:
    from common.export.model_card import _data, _data_names

    assert _data_names("owner/name@main") == ["owner/name"]
    assert _data_names(["owner/name", "/home/me/secret.jsonl"]) == ["owner/name", ""]
    record, recipe = SimpleNamespace(data=SimpleNamespace(model_dump=dict)), SimpleNamespace(data_hash="ab")
    assert _data(record, recipe, ["owner/name", ""]) == (  # type: ignore[arg-type]
        "[owner/name](https://huggingface.co/datasets/owner/name) and a local data set. SHA-256 of the rows: `ab`."
    )
    assert _data(record, recipe, [""]) == "A local data set. SHA-256 of the rows: `ab`."  # type: ignore[arg-type]

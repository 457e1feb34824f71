"""Files, folders and hub data sets: the same rows whichever they come in."""

import csv
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from common.commands.arguments import read_flags
from common.data.findings import quality_warnings
from common.data.load import check_fields, load_data, read_rows
from common.errors import UserError
from common.option_sources import load_options
from tests.tiny import chat

ROWS = [{"instruction": f'港 {i}, "x"\nand', "output": f"00{i}"} for i in range(3)] + [
    {"instruction": "NA", "output": "null"}
]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, kind: str) -> None:
    data = load_data(str(write(tmp_path, kind)), 0, 0)
    assert [[m["content"] for m in row.messages] for row in data.train] == [list(row.values()) for row in ROWS]
    assert data.described() == "Alpaca, 4 rows"


def test_places_are_lines_where_there_are_lines(tmp_path: Path) -> None:
    places = {kind: [row.source for row in read_rows(write(tmp_path, kind))] for kind in ("jsonl", "csv", "parquet")}
    assert places["jsonl"] == [f"rows.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert places["csv"] == [f"rows.csv:{n}" for n in (2, 4, 6, 8)]  # the first three have texts of two lines
    assert places["parquet"] == [f"rows.parquet:{n}" for n in (1, 2, 3, 4)]


def test_a_json_object_with_one_list_and_lines_under_a_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert len(read_rows(path)) == 4
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.source for row in read_rows(path)][-1] == "a.json:4"
    path.write_text(json.dumps(chat("Hi", "Yo")))
    assert len(read_rows(path)) == 1
    path.write_text(json.dumps({"a": [], "b": []}))
    with pytest.raises(UserError, match="holds 2 lists of rows"):
        read_rows(path)
    path.write_text("[{]")
    with pytest.raises(UserError, match=r"is not JSON \(line 1, column 3\)"):
        read_rows(path)
    path.write_bytes(json.dumps(ROWS).encode() + "\n日".encode()[:-1])
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_rows(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in [chat("a" * (1 << 20), "Yo"), *ROWS]))
    assert len(read_rows(path)) == 5


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_pipe_is_read_once(tmp_path: Path, suffix: str, bad: bool) -> None:
    path, lines = tmp_path / f"a{suffix}", "".join(json.dumps(row) + "\n" for row in ROWS)
    os.mkfifo(path)
    content = b"\xff\n" if bad else (lines if suffix == ".jsonl" else json.dumps(ROWS)).encode()
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    if bad:
        with pytest.raises(UserError, match="is not UTF-8 text"):
            read_rows(path)
    else:
        assert len(read_rows(path)) == 4
    writer.join(5)
    assert not writer.is_alive()


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\nOnce\nupon\n\n \nA time\n")
    assert [(row.text, row.source) for row in read_rows(path)] == [("Once\nupon", "a.txt:2"), ("A time", "a.txt:6")]
    path.write_bytes(b"\r\nOnce\r\nupon\r\n\r\n \r\nA time\r\n")
    assert [(row.text, row.source) for row in read_rows(path)] == [("Once\nupon", "a.txt:2"), ("A time", "a.txt:6")]


BAD = ['{"messages": [', '{"texts": "Hi"}', '"Hi"', '{"prompt": "Hi", "chosen": "a", "rejected": "b"}']


def test_faulty_rows_are_dropped_and_listed_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row) for row in ROWS]
    path.write_text("\n".join([good[0], *BAD, *good[1:]]))
    data = load_data(str(path), 0, 0, on_bad_row="drop")
    assert [row.source for row in data.train] == ["a.jsonl:1", *(f"a.jsonl:{n}" for n in (6, 7, 8))]
    assert [place for place, _ in data.bad.first] == [f"a.jsonl line {n}" for n in (2, 3, 4, 5)]
    assert data.bad.first[0][1] == "is not JSON at column 15: Expecting value"
    path.write_text("\n".join(BAD))
    with pytest.raises(UserError) as caught:
        load_data(str(path), 0, 0, on_bad_row="drop")
    assert caught.value.what.startswith(
        f"{path} holds nothing to train on: 4 bad rows (--on-bad-row drop):\na.jsonl line 1: is not JSON"
    )
    with pytest.raises(UserError) as caught:
        load_data(str(path), 0, 0)
    assert caught.value.fix.startswith("Correct them, or leave such rows out: --on-bad-row drop; each line:")
    with pytest.raises(UserError) as caught:
        read_rows(path)  # what no option drops
    assert "--on-bad-row" not in caught.value.fix


def test_columns_that_nothing_reads_are_known(tmp_path: Path) -> None:
    rows = [
        {"messages": chat("Hi", "Yo")["messages"], "tools": [], "id": 7, "prompt": "Hi", "source": ""},
        {"system": "Be", "messages": chat("Hi", "Ho")["messages"], "weight": 1, "source": "web"},
    ]
    rows[0]["messages"][1] |= {"loss": False, "id": 1, "images": []}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.csv").write_text("instruction,input,output,system,score\nHi,,Yo,Be,5\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    unread = {
        tmp_path / "train.jsonl": ["id", "prompt", "messages[].id", "messages[].loss", "source"],
        tmp_path / "valid.csv": ["score"],
    }
    assert load_data(str(tmp_path), 0, 0).unread == {str(path): columns for path, columns in unread.items()}
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Once", "prompt": "Hi", "system": "Be"}))
    assert load_data(str(tmp_path / "a.jsonl"), 0, 0).unread == {str(tmp_path / "a.jsonl"): ["prompt", "system"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,completion\nHi,Yo\nHi\n", "has 1 bad line(s):\na.csv line 3: has 1 columns, its header 2"),
        ('prompt,completion\n"a\nb",Yo\nHi,"Y"o\n', "line 4: ',' expected after '\"'"),
        ('prompt,completion\nHi,"Yo\n', "line 2: unexpected end of data"),
        ("prompt;completion\nHi;Yo\n", "its columns are separated by semicolons."),
        ("prompt\tcompletion\nHi\tYo\n", "its columns are separated by tabs."),
        ("prompt,prompt\nHi,Yo\n", "two columns are named 'prompt'."),
        ("prompt,completion\n", "is empty: it holds no rows."),
    ],
)
def test_a_csv_that_is_not_one(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert said in caught.value.what


def test_two_columns_of_other_names_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("my words,返し\nHi,Yo\n")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "--field prompt='my words' completion='返し', or the other way round. " in caught.value.fix
    path.write_text("my words,返し,c\nHi,Yo,1\n")
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "--field PART=COLUMN" in caught.value.fix


@pytest.mark.parametrize(
    "text", ['{\n"prompt": "Hi",\n"completion": "Yo"\n}\n', '[{"prompt": "Hi"},\n{"prompt": "Ho"}]\n']
)
def test_rows_that_are_not_lines_are_told_apart_from_bad_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert (
        "A file that holds a list of rows is named .json; rows over several lines become lines by" in caught.value.fix
    )
    path.write_text(text + '{"prompt": "Hi", "completion": "Yo"}\n')
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert "named .json" not in caught.value.fix


@pytest.mark.parametrize("text", ['{"prompt": "Hi", "completion": "Yo",}', '{"a": [1, 2, ] }', '{"a": {"b": 1,\t}}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_comma_behind_the_last_element_is_named(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name)
    assert caught.value.what.endswith("(a comma behind the last one)")


def test_an_empty_cell_is_no_input_and_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.CSV"
    path.write_text("instruction,input,output\nHi,,Yo\nHo,,\n")
    data = load_data(str(path), 0, 0)
    assert [m["content"] for m in data.train[0].messages] == ["Hi", "Yo"]
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {"rows without an answer": ["a.CSV:3"]}


def test_a_csv_says_which_rows_are_trained(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    given = {"a": "True,", "b": "FALSE,1", "c": ",0.0", "d": ",1", "e": "true,0.5"}
    turns = "[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': '%s'}]".replace("'", '""')
    path.write_text(
        "messages,train,weight\n" + "".join(f'"{turns % answer}",{cells}\n' for answer, cells in given.items())
    )
    data = load_data(str(path), 0, 0)
    assert [row.messages[1]["content"] for row in data.train] == ["a", "d", "e"]
    assert [row.weight for row in data.train] == [1, 1, 0.5]
    assert {kind: rows.first for kind, rows in data.left_out.items()} == {
        "rows with train: false or weight: 0": ["a.csv:3", "a.csv:4"]
    }


def test_a_file_of_an_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"files ending in \.xlsx are not read"):
        read_rows(tmp_path / "a.xlsx")


def test_parquet_keeps_lists_of_turns_and_loses_the_keys_they_lack(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    turns = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "assistant", "content": "Yo"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet")[0].messages
    assert [call["function"]["arguments"] for call in first["tool_calls"]] == [{"a": 1}, {"b": 2}]
    assert second == {"role": "assistant", "content": "Yo"}


def test_faults_of_a_parquet_file_name_rows(tmp_path: Path) -> None:
    from datetime import date

    import pyarrow
    import pyarrow.parquet

    call = {"function": {"name": "f", "arguments": {"day": date(2026, 1, 1)}}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / "a.parquet")
    assert caught.value.what.endswith("a.parquet row 1: turn 1: `arguments` holds a value that JSON cannot express")


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_rows(tmp_path / "a.parquet")


def test_a_folder_of_mixed_kinds(tmp_path: Path) -> None:
    write(tmp_path, "csv").rename(tmp_path / "train.csv")
    write(tmp_path, "parquet").rename(tmp_path / "validation.parquet")
    data = load_data(str(tmp_path), 0.5, 0)
    assert (len(data.train), len(data.valid), len(data.test)) == (4, 4, 0)
    write(tmp_path, "jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"it holds both train\.jsonl and train\.csv"):
        load_data(str(tmp_path), 0.5, 0)


# --- --field


def test_fields_from_flags_and_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("field: {prompt: q, completion: a}\n")
    for flags in (["--field", "prompt=q", "completion=a"], ["--config", str(tmp_path / "a.yaml")]):
        assert load_options(read_flags(flags))[0].field == {"prompt": "q", "completion": "a"}


def test_a_column_that_is_not_there_and_a_part_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    check_fields({"instruction": "x", "output": "y", "system": "z"})
    for fields, said in (
        ({"instructions": "x"}, "--field: 'instructions' is not a part of a row; known: messages,"),
        ({"instruction": "x", "prompt": "y"}, "--field: instruction and prompt are the same part."),
        ({"messages": "x", "output": "y"}, "--field: messages and output belong to different formats."),
    ):
        with pytest.raises(UserError) as caught:
            check_fields(fields)
        assert caught.value.what.startswith(said)
    with pytest.raises(UserError) as caught:
        load_data(str(path), 0, 0, {"prompt": "question"})
    assert caught.value.what == f"--field prompt=question: {path} has no such column."
    assert caught.value.fix == "Its columns: instruction, output."


# --- the validation split


def test_rows_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat(f"Q{i % 10}", f"A{i}")) + "\n" for i in range(40)))
    for seed in range(5):
        data = load_data(str(path), 0.2, seed)
        prompts = [{row.messages[0]["content"] for row in part} for part in (data.train, data.valid)]
        assert prompts[0] & prompts[1] == set()
        assert len(data.valid) == 8
    assert len(load_data(str(path), 0.05, 0).valid) == 4  # two rows were asked for, no prompt has so few
    path.write_text("".join(json.dumps(chat("Q", f"A{i}")) + "\n" for i in range(4)))
    assert len(load_data(str(path), 0.5, 0).valid) == 0  # all or nothing, and training needs rows


def test_rows_of_one_conversation_are_held_out_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def turns(talk: int, count: int) -> dict[str, Any]:
        return {"messages": [m for n in range(count) for m in chat(f"Q{talk}.{n}", f"A{n}")["messages"]]}

    rows = [turns(talk, count) for talk in range(20) for count in (1, 2, 3, 4) if (talk, count) != (3, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in range(5):
        data = load_data(str(path), 0.1, seed)
        begun = [{row.messages[0]["content"] for row in part} for part in (data.train, data.valid)]
        assert (begun[0] & begun[1], len(data.valid)) == (set(), 8)
        assert quality_warnings(data) == []
    greeting = [turns(0, 1), *({"messages": [*turns(0, 1)["messages"], *turns(n, 1)["messages"]]} for n in range(9))]
    path.write_text("".join(json.dumps(row) + "\n" for row in greeting))
    assert len(load_data(str(path), 0.2, 0).valid) == 2  # all begin alike: by their prompts
    long = [turns(talk, count) for talk in range(3) for count in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in long))
    assert len(load_data(str(path), 0.1, 0).valid) == 9  # not a third


# --- the hub, with the library's call substituted: no network here


def hub(monkeypatch: pytest.MonkeyPatch, answer) -> list:
    """The real library's data sets, as `load_dataset` would give them."""
    import datasets

    asked = []

    def load_dataset(name, config, revision, split):
        asked.append((name, config, revision, split))
        if isinstance(answer, Exception):
            raise answer
        found = datasets.DatasetDict({part: datasets.Dataset.from_list(rows) for part, rows in answer.items()})
        return found[split] if split else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_with_its_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, {"train": ROWS, "validation": ROWS[:1], "other": ROWS})
    data = load_data("owner/name:japanese@refs/pr/1", 0.5, 0)
    assert asked == [("owner/name", "japanese", "refs/pr/1", None)]
    assert (len(data.train), len(data.valid), len(data.test)) == (4, 1, 0)
    assert data.train[2].source == "train:3"


def test_a_hub_data_set_of_one_split_is_held_out_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, {"default": ROWS})
    data = load_data("owner/name", 0.25, 0)
    assert (len(data.train), len(data.valid)) == (3, 1)


def test_a_split_of_a_hub_data_set_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, {"train_sft": ROWS, "test_sft": ROWS[:2]})
    with pytest.raises(UserError) as caught:
        load_data("owner/name", 0, 0)
    assert caught.value.what == "--data owner/name: it has no train split, only train_sft, test_sft."
    assert caught.value.fix == "Choose one: owner/name#train_sft"
    assert len(load_data("owner/name#test_sft", 0, 0).train) == 2
    assert asked[1] == ("owner/name", None, None, "test_sft")


def test_pictures_of_a_hub_data_set_are_refused_without_being_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import pyarrow

    monkeypatch.chdir(tmp_path)
    text = datasets.Value("string")
    info = datasets.DatasetInfo(
        features=datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    )
    table = pyarrow.Table.from_pylist(
        [{"image": {"bytes": b"no picture", "path": "a.png"}, "question": "Hi", "answer": "Yo"}]
    )
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), info=info)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": rows}))
    with pytest.raises(UserError, match="train row 1: has `image`, and only text is trained"):
        load_data("owner/name", 0, 0)
    assert len(load_data("owner/name", 0, 0, {"prompt": "question"}).train) == 1


def test_the_hub_fails_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(UserError) as caught:
        load_data("owner/name", 0.25, 0)
    assert caught.value.what == (
        "--data owner/name: no such file or folder, and the hub's data set cannot be loaded: no route"
    )


def test_a_path_comes_before_a_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = hub(monkeypatch, {})
    (tmp_path / "owner").mkdir()
    write(tmp_path, "jsonl").rename(tmp_path / "owner" / "name")
    assert len(load_data("owner/name", 0, 0).train) == 4
    assert asked == []


def test_a_parquet_file_whose_texts_are_not_utf_8(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["qqqqqqqq"], "completion": ["b"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"qqqqqqqq", b"qqq\xf9qqqq"))
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read as Parquet: .*utf-8"):
        load_data(str(path), 0.0, 0)

"""`check-data` on the tiny model: counts, percentiles, long rows, colored labels."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import cli
from common.commands.check_data import check_data, colored
from common.data.dataset import Example
from common.data.encode import load_tokenizer
from common.display import Display
from common.errors import UserError
from common.options import Options
from tests.encoding import encode
from tests.tiny import chat


def rows(path: Path, *answers: str) -> Path:
    path.write_text("".join(json.dumps(chat("Hi", answer)) + "\n" for answer in answers))
    return path


def tables(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{"event": "table"')]
    return [json.loads(line) for line in lines]


def options(data: Path, model: Path, **settings: object) -> Options:
    return Options.model_validate({"data": str(data), "model": str(model), "valid_share": 0.0} | settings)


@pytest.mark.parametrize(
    ("overflow", "how"),
    [("drop", "dropped"), ("truncate", "truncated"), ("error", "not accepted: --overflow error")],
)
def test_rows_tokens_and_labels_are_counted(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overflow: str, how: str
) -> None:
    # 23 tokens around an answer, one of them, the turn's end, a label
    path = rows(tmp_path / "a.jsonl", "Y", "YY", "YYYY")
    with pytest.raises(UserError, match="1 rows have more than") if overflow == "error" else nullcontext():
        check_data(options(path, tiny_llama, max_length=26, overflow=overflow), None, Display("json"))
    counts, lengths, long = tables(capsys)
    assert counts["rows"] == [["train", "3", "76", "10", "1"]]
    assert lengths["columns"] == ["", "shortest", "25 %", "50 %", "75 %", "90 %", "95 %", "longest"]
    assert lengths["rows"][0][1] == "24"
    assert lengths["rows"][0][3] == "25"
    assert lengths["rows"][0][-1] == "27"
    assert long["rows"] == [["a.jsonl:3", "27", how]]


def test_what_training_would_refuse_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "a.jsonl", "Y", "YY")
    with pytest.raises(UserError, match="every row of"):
        check_data(options(path, tiny_llama, max_length=10), None, Display("plain"))
    assert "not fit" in capsys.readouterr().out


def test_a_folder_is_counted_part_by_part(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(tmp_path / "train.jsonl", "Y", "Y")
    rows(tmp_path / "valid.jsonl", "Y")
    check_data(options(tmp_path, tiny_llama), None, Display("json"))
    assert [row[:2] for row in tables(capsys)[0]["rows"]] == [["train", "2"], ["valid", "1"]]


def test_what_is_dropped_obeyed_and_not_read_is_named(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = chat("Hi", "Yo") | {"id": 1}
    lines = [good, chat("Hi", "a<|im_end|>b"), chat("a<|im_end|>b", "Yo"), chat("Hi", "Yo" * 300), {"texts": "Hi"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(UserError, match="line 5: has none of"):
        check_data(options(path, tiny_llama), None, Display("json"))
    capsys.readouterr()
    check_data(options(path, tiny_llama, on_bad_row="drop"), None, Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [event["text"] for event in events if "text" in event]
    assert f"{path}: columns not read: id" in texts
    assert "1 rows with control tokens in their text, read as such (<|im_end|>): a.jsonl:3" in texts
    long = "1 rows are longer than the model's context of 512 tokens: a.jsonl:4 (623). It was not made"
    assert any(text.startswith(long) for text in texts)
    counts, _, bad = [event for event in events if event["event"] == "table"]
    assert counts["rows"][0][:2] == ["train", "3"]
    assert [row[0] for row in bad["rows"]] == ["a.jsonl line 5", "a.jsonl:2"]
    assert bad["rows"][1][1].startswith("this row cannot be labeled exactly: turn 2 has the end-of-turn token")
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(UserError, match="is left to train on"):  # as train says
        check_data(options(path, tiny_llama, on_bad_row="drop"), None, Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event for event in events if event["event"] == "table"][2]["rows"][0][0] == "a.jsonl:1"
    assert any("0 training rows are too few" in str(event) for event in events)


def test_options_about_turns_are_told_where_there_are_none(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Once"}\n')
    check_data(options(path, tiny_llama, train_on="last"), None, Display("plain"))
    assert "warning: --train-on last: without effect on labels, as all 1 rows are plain" in capsys.readouterr().out


def test_three_rows_are_shown(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_data(options(rows(tmp_path / "a.jsonl", *"ABCD"), tiny_llama), None, Display("plain"))
    out = capsys.readouterr().out
    assert [f"a.jsonl:{n}: 24 tokens, 2 of them labels" in out for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert "[A<|im_end|>]" in out


def test_with_json_the_rows_are_events_too(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_data(options(rows(tmp_path / "a.jsonl", "A"), tiny_llama), None, Display("json"))
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [event["text"] for event in events if event["event"] == "note"]
    assert "\na.jsonl:1: 24 tokens, 2 of them labels" in texts
    assert any("[A<|im_end|>]" in text for text in texts)


def test_the_command_prints_its_verdict_as_an_event(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rows(tmp_path / "a.jsonl", "A")
    monkeypatch.setattr(sys, "argv", ["cli.py", "check-data", str(path), "--model", str(tiny_llama), "--json"])
    cli.main()
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["event"] == "verdict"
    assert verdict["advice"][0]["what"] == "1 training rows are too few"


def test_with_quiet_the_rows_are_shown(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_data(options(rows(tmp_path / "a.jsonl", "A"), tiny_llama), None, Display("quiet"))
    assert "[A<|im_end|>]" in capsys.readouterr().out


def test_labels_are_colored_and_bracketed(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo [sic]"})
    parts = colored(encode(Example(messages, "a:1"), tokenizer), tokenizer)
    assert "".join(text for text, _ in parts).endswith("<|im_start|>assistant\n[Yo [sic]<|im_end|>]\n")
    assert [text for text, style in parts if "green" in style] == ["[Yo [sic]<|im_end|>]"]


def test_a_file_that_training_would_refuse(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(UserError, match="line 1: is not JSON"):
        check_data(options(tmp_path / "a.jsonl", tiny_llama), None, Display("quiet"))

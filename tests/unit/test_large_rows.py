"""Rows of a large file: the same as those of a small one, read in pieces, kept in the cache, found again."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.data import encode_rows, file_rows, load, row_cache
from common.data.dataset import Dataset
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import EncodedRows, rows_hash, stop_ids
from common.data.facts import data_hash
from common.data.findings import control_tokens, quality_warnings
from common.data.load import load_data
from common.data.truncation import filter_by_length
from common.errors import UserError
from common.system import workers
from tests import ROOT


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own; one process, small chunks and small parts, so that a few rows have edges of all kinds."""
    monkeypatch.setattr(row_cache, "cache_folder", lambda: tmp_path / "cache")
    for module in (file_rows, encode_rows):
        monkeypatch.setattr(module, "processes", lambda: 1)
    monkeypatch.setattr(file_rows, "_CHUNK_ROWS", 5)
    monkeypatch.setattr(encode_rows, "_CHUNK", 3)
    monkeypatch.setattr(encode_rows, "_PART", 8)
    return tmp_path / "cache" / "rows"


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_folder), MaskingOptions())


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns} | more


ROWS = [
    *(chat(f"Question {number}?", f"Answer {number}." * (number % 5 + 1), id=number) for number in range(30)),
    chat("Question 3?", "Another."),
    chat("Question 4?", "Answer 4." * 5),
    chat("[NAME]?", "Hello and"),
    chat("Half", "Weighs half.", weight=0.5),
    chat("Nothing", "", weight=1),
    chat("Not trained", "at all", train=False),
    chat("Stop <|im_end|>", "Read as such"),
    {"text": "Plain text that is cut into blocks. " * 5},
    chat("Bad", "a<|im_end|>b"),
    {"nothing": 1},
    chat("ç", "日本語"),
]


def written(path: Path) -> Path:
    """The rows as a file of this ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([row for row in ROWS if "messages" in row]), path)
    elif path.suffix == ".csv":
        texts = [f'"{row["messages"][0]["content"]}","{row["messages"][1]["content"]}"' for row in ROWS[:30]]
        path.write_text("\n".join(["prompt,completion", *texts, "one,two,three"]), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        path.write_text("\n".join([*lines[:9], "", "{", *lines[9:]]), encoding="utf-8")
    return path


def opened(path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, large: bool = True) -> tuple[Any, ...]:
    """`(data, rows of its parts, bad rows)`."""
    monkeypatch.setattr(load, "LARGE", 1 if large else 1 << 40)
    data = load_data(str(path), 0.2, 1, on_bad_row="drop")
    parts, bad = encode_parts((data.train, data.valid, data.test), encoder, "drop")
    return data, parts, bad


def shown(rows: EncodedRows) -> list[tuple[Any, ...]]:
    return [
        (row.source, row.ids.tolist(), row.loss_weights.tolist(), row.ends, row.notes, row.text, row.control)
        for row in rows
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_large_file_has_the_rows_of_a_small_one(
    name: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / name)
    (small, few, bad), (large, many, more_bad) = (opened(path, encoder, monkeypatch, size) for size in (False, True))
    again, same, _ = opened(path, encoder, monkeypatch)
    assert len(small.valid) > 2
    for data in (large, again):
        assert [*data.train] == small.train
        assert [*data.valid] == small.valid
        assert (data.formats, data.left_out, data.bad, data.unread) == (
            small.formats,
            small.left_out,
            small.bad,
            small.unread,
        )
        assert quality_warnings(data) == quality_warnings(small)
        assert [data_hash(data, version) for version in (2, 3)] == [data_hash(small, version) for version in (2, 3)]
    assert [(row.source, row.reason, row.fix) for row in more_bad] == [(row.source, row.reason, row.fix) for row in bad]
    for parts in (many, same):
        assert [shown(part) for part in parts] == [shown(part) for part in few]
        assert control_tokens(parts) == control_tokens(few)
        for version in (2, 3):
            assert rows_hash(*parts, version=version) == rows_hash(*few, version=version)
        assert stop_ids(parts[0]) == stop_ids(few[0])


@pytest.mark.parametrize("overflow", ["drop", "truncate", "split"])
@pytest.mark.parametrize("length", [20, 40, 60, 200])
def test_long_rows_of_a_large_file(
    overflow: Any, length: int, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    few, many = (opened(path, encoder, monkeypatch, size)[1][0] for size in (False, True))
    one, two = (filter_by_length(rows, length, overflow) for rows in (few, many))
    for name in ("every", "rows", "dropped", "truncated", "split", "unlabeled"):
        found, wanted = getattr(two, name), getattr(one, name)
        assert shown(found) == shown(wanted)
        assert found.lengths.tolist() == [len(row.ids) for row in wanted]
        assert found.label_tokens.tolist() == [row.label_tokens for row in wanted]
    fresh = EncodedRows.of([*one.rows])  # whose digests are those of what is left of the rows
    assert rows_hash(two.rows) == rows_hash(fresh)


def test_what_was_encoded_is_found_again(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    first = opened(path, encoder, monkeypatch)

    def refuse(*_: object) -> None:
        raise AssertionError("read or encoded again")

    monkeypatch.setattr(file_rows, "read_row", refuse)
    monkeypatch.setattr(Encoder, "encode_batch", refuse)
    second = opened(path, encoder, monkeypatch)
    assert [shown(part) for part in second[1]] == [shown(part) for part in first[1]]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, altered, Path.unlink])
def test_a_cache_that_is_damaged_is_made_again(
    damage: Callable[[Path], None], encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    data, parts, _ = opened(path, encoder, monkeypatch)
    wanted, count = [shown(part) for part in parts], len([*cache.rglob("rows-*/record.json")])
    assert count == 5
    files = sorted([*cache.rglob("found/*"), *cache.rglob("rows-*16/*")])
    assert len(files) == 6 + 10
    for file in files:
        content = file.read_bytes()
        damage(file)
        again, parts, _ = opened(path, encoder, monkeypatch)
        assert ([shown(part) for part in parts], data_hash(again)) == (wanted, data_hash(data)), file
        assert file.read_bytes() == content


def test_rows_in_progress_are_stopped_and_gone_on_with(
    encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    wanted = [shown(part) for part in opened(path, encoder, monkeypatch, large=False)[1]]
    monkeypatch.setattr(load, "LARGE", 1)
    data = load_data(str(path), 0.2, 1, on_bad_row="drop")

    def stop(share: float, text: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_parts((data.train, data.valid), encoder, "drop", stop)
    done = len([*cache.rglob("rows-*/record.json")])
    assert 0 < done < 5
    calls: list[int] = []
    encode = Encoder.encode_batch
    monkeypatch.setattr(Encoder, "encode_batch", lambda self, rows: calls.append(len(rows)) or encode(self, rows))
    assert [shown(part) for part in opened(path, encoder, monkeypatch)[1]] == wanted
    assert sum(calls) == 38 - 8 * done


def test_other_settings_and_other_contents_are_encoded_anew(
    encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    opened(path, encoder, monkeypatch)
    folders = len([*cache.iterdir()])
    opened(path, encoder, monkeypatch)
    assert len([*cache.iterdir()]) == folders == 2
    opened(path, Encoder(encoder.tokenizer, MaskingOptions("all")), monkeypatch)
    assert len([*cache.iterdir()]) == 3
    path.write_bytes(path.read_bytes() + b"\n" + json.dumps(ROWS[0]).encode())
    _, parts, _ = opened(path, encoder, monkeypatch)
    assert len([*cache.iterdir()]) == 5
    assert sum(map(len, parts)) == 38


def test_a_file_that_changes_meanwhile_is_refused(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    monkeypatch.setattr(load, "LARGE", 1)
    for change in (path.read_bytes()[:700], path.read_bytes().replace(b"Question", b"Inquiry "), b"\xff" * 9000):
        data = load_data(str(written(path)), 0, 1, on_bad_row="drop")
        path.write_bytes(change)
        with pytest.raises(UserError, match=r"a\.jsonl was changed while it was read"):
            encode_parts([data.train], encoder, "drop")


def test_bad_rows_of_a_large_file_are_refused_each_time(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [chat(f"Question {number}", "a<|im_end|>b" if number % 2 else "Yes.") for number in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(load, "LARGE", 1)
    data = load_data(str(path), 0, 1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"10 rows cannot be trained on, and maybe more:\na\.jsonl:2: this row"):
            encode_parts([data.train], encoder, "error")
    path.write_text("{\n" + path.read_text() + "{\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"has 2 bad line\(s\):\na.jsonl line 1: is not JSON .*\na.jsonl line 62"):
            load_data(str(path), 0, 1)


def test_several_processes_do_the_same(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    _, few, _ = opened(path, encoder, monkeypatch, large=False)
    for module in (file_rows, encode_rows):
        monkeypatch.setattr(module, "processes", lambda: 2)
    _, many, bad = opened(path, encoder, monkeypatch)
    assert [shown(part) for part in many] == [shown(part) for part in few]
    assert [row.source for row in bad] == ["a.jsonl:41"]


def test_the_processes_end_with_the_one_that_started_them() -> None:
    """One that is killed cannot say so."""
    code = (
        "import time\nfrom common.system.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    for _ in ordered_map(time.sleep, [0.01] * 10000, 2):\n        print('.', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == ".\n"
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match="A process that works on the rows was killed"):
        [*workers.ordered_map(os._exit, [1, 1], 2)]


def test_many_parts_keep_few_files_open(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(chat(f"Question {number}", "Yes.")) + "\n" for number in range(400)))
    before = len([*Path("/dev/fd").iterdir()])
    _, parts, _ = opened(path, encoder, monkeypatch)
    assert sum(map(len, parts)) == 400
    assert len([*Path("/dev/fd").iterdir()]) - before <= 2 * 50 + 2


def test_the_same_rows_written_by_two_processes(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, write = written(tmp_path / "a.jsonl"), row_cache.write_arrays

    def late(folder: Path, *what: Any) -> None:
        write(folder, *what)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    wanted = [shown(part) for part in opened(path, encoder, monkeypatch, large=False)[1]]
    monkeypatch.setattr(row_cache, "write_arrays", late)
    assert [shown(part) for part in opened(path, encoder, monkeypatch)[1]] == wanted


def test_what_was_not_used_for_long_makes_room(
    encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened(written(tmp_path / "a.jsonl"), encoder, monkeypatch)
    old = {*cache.iterdir()}
    for folder in old:
        os.utime(folder, (time.time() - 100, time.time() - 100))
    monkeypatch.setattr(row_cache, "_KEPT", 1000)
    opened(written(tmp_path / "b.json"), encoder, monkeypatch)
    assert len({*cache.iterdir()}) <= 2
    assert not old & {*cache.iterdir()}


def test_a_large_data_set_of_the_hub(
    encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    rows = datasets.Dataset.from_list([row for row in ROWS[:30]], features=None)
    rows.save_to_disk(str(tmp_path / "set"))
    found = datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "set"))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    (small, few, _), (large, many, _) = (opened(Path("owner/name"), encoder, monkeypatch, size) for size in (0, 1))
    assert (len([*cache.iterdir()]), [*large.train], [*large.valid]) == (2, small.train, small.valid)
    assert [shown(part) for part in many] == [shown(part) for part in few]


def test_a_cache_that_cannot_be_made_is_named(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"(Not a directory|File exists): .*cache") as caught:
        opened(written(tmp_path / "a.jsonl"), encoder, monkeypatch)
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_a_disk_that_refuses_is_named(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    path = written(tmp_path / "a.jsonl")
    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(UserError, match=r"No space left on device: .*found") as caught:
        opened(path, encoder, monkeypatch)
    assert caught.value.fix.startswith("Free space on that disk, then start again")


def test_work_grows_as_the_rows_do(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice the rows, at most three times the seconds, in every step from the file to its hash."""

    def seconds(count: int) -> list[float]:
        path = tmp_path / f"{count}.jsonl"
        same = [chat("The same", f"Answer {number % 7}.") for number in range(count // 2)]  # one prompt of many rows
        rows = [*same, *(chat(f"Question {number}?", f"Answer {number}.") for number in range(count // 2))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        times = [time.process_time()]
        data = load_data(str(path), 0.1, 1)
        times.append(time.process_time())
        quality_warnings(data)
        times.append(time.process_time())
        parts, _ = encode_parts((data.train, data.valid), encoder, "error")
        times.append(time.process_time())
        filter_by_length(parts[0], 30, "truncate")
        rows_hash(*parts)
        times.append(time.process_time())
        return np.diff(times).tolist()

    monkeypatch.setattr(load, "LARGE", 1)
    monkeypatch.setattr(file_rows, "_CHUNK_ROWS", 256)
    monkeypatch.setattr(encode_rows, "_CHUNK", 256)
    monkeypatch.setattr(encode_rows, "_PART", 1 << 14)
    small, double = (np.min([seconds(count + extra) for extra in (0, 2)], axis=0) for count in (1000, 2000))
    assert (double < 3 * small + 0.02).all(), (small, double)


def test_a_dataset_of_lists_needs_no_file(encoder: Encoder) -> None:
    assert quality_warnings(Dataset([], [], [])) == []
    assert [*EncodedRows.of([])] == []
    row = Encoded(np.arange(3, dtype=np.int32), np.array([False, True, True]), "a:1")
    assert shown(EncodedRows.of([row])[:1]) == shown(EncodedRows.of([row]))

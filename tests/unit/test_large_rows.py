"""Rows of a large file: the same as those of a small one, read in pieces, kept in the cache, found again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
from pyarrow import parquet

from common.data import arrow_rows, file_rows, load, row_cache, row_parts
from common.data.dataset import Counted, Dataset
from common.data.encode import Encoded, Encoder, MaskingOptions, load_tokenizer
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import EncodedRows, FlatRows, Kind, Store, rows_hash, stop_ids
from common.data.facts import Facts, Sources, data_hash
from common.data.file_rows import FileRows
from common.data.findings import control_tokens, quality_warnings
from common.data.load import load_data
from common.data.readers import file_source
from common.data.training_rows import load as load_rows
from common.data.truncation import filter_by_length
from common.data.turn_edges import BadRow
from common.display import Display
from common.errors import UserError
from common.options import Options
from common.system import workers
from common.system.cache import cache_folder
from tests import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own; one process, small chunks and small parts, so that a few rows have edges of all kinds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(row_parts, "processes", lambda: 1)
    monkeypatch.setattr(row_parts, "_CHUNK_ROWS", 3)
    monkeypatch.setattr(row_parts, "_PART_ROWS", 8)
    return cache_folder() / "rows"


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


def shown_bad(rows: Counted[BadRow]) -> list[tuple[str, str, str]]:
    assert len(rows) == len(rows.first)
    return [(row.source, row.reason, row.fix) for row in rows.first]


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
    assert shown_bad(more_bad) == shown_bad(bad)
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
    wanted, count = [shown(part) for part in parts], len([*cache.rglob("part-*/record.json")])
    assert count == 2 * 5
    files = sorted(cache.rglob("part-000001/*"))
    assert len(files) == 7 + 10
    for file in files:
        content = file.read_bytes()
        damage(file)
        again, parts, _ = opened(path, encoder, monkeypatch)
        assert ([shown(part) for part in parts], data_hash(again)) == (wanted, data_hash(data)), file
        assert file.read_bytes() == content


@pytest.mark.parametrize("stopped", ["reading", "encoding"])
def test_rows_in_progress_are_stopped_and_gone_on_with(
    stopped: str, encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    wanted = [shown(part) for part in opened(path, encoder, monkeypatch, large=False)[1]]
    monkeypatch.setattr(load, "LARGE", 1)
    read: list[str] = []
    read_row = file_rows.read_row
    monkeypatch.setattr(
        file_rows, "read_row", lambda row, where, fields: read.append(where) or read_row(row, where, fields)
    )

    def stop(share: float, text: str) -> None:
        assert 0 <= share <= 1
        if text == "27 rows":
            raise KeyboardInterrupt

    def start() -> None:
        watch = {"progress": stop} if stopped == "reading" else {}
        data = load_data(str(path), 0.2, 1, on_bad_row="drop", **watch)
        read.clear()
        encode_parts((data.train, data.valid), encoder, "drop", stop)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert len(read) == 26  # one of the 27 is not JSON
    assert len([*cache.rglob("part-*/record.json")]) == (2 if stopped == "reading" else 5 + 2)
    read.clear()
    assert [shown(part) for part in opened(path, encoder, monkeypatch)[1]] == wanted
    assert len(read) == (24 + 41 if stopped == "reading" else 24)


def test_other_settings_and_other_contents_are_encoded_again(
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "changed", [lambda old: old[:700], lambda old: old.replace(b"Question", b"Inquiry "), lambda old: b"\xff" * 9000]
)
def test_a_file_that_changes_meanwhile_is_refused(
    name: str, changed: Callable[[bytes], bytes], encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / name)
    monkeypatch.setattr(load, "LARGE", 1)
    data = load_data(str(path), 0, 1, on_bad_row="drop")
    path.write_bytes(changed(path.read_bytes()))
    with pytest.raises(UserError, match=r"a\.jsonl? was changed while it was read"):
        encode_parts([data.train], encoder, "drop")


@pytest.mark.parametrize("of", ["found", "encoded"])
def test_a_part_that_belongs_elsewhere_is_made_again(
    of: str, encoder: Encoder, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl")
    data, parts, _ = opened(path, encoder, monkeypatch)
    wanted = [shown(part) for part in parts]
    (folder,) = (folder for folder in cache.iterdir() if (folder / "part-000000/ids.npy").exists() == (of == "encoded"))
    for number in (2, 4):
        shutil.rmtree(folder / f"part-00000{number}")
        shutil.copytree(folder / "part-000001", folder / f"part-00000{number}")
        again, parts, _ = opened(path, encoder, monkeypatch)
        assert ([shown(part) for part in parts], data_hash(again)) == (wanted, data_hash(data))
    record = json.loads((folder / "part-000001/record.json").read_text())
    (folder / "part-000001/record.json").write_text(json.dumps(record | {"arrays": {}}))
    assert [shown(part) for part in opened(path, encoder, monkeypatch)[1]] == wanted


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
    monkeypatch.setattr(row_parts, "processes", lambda: 2)
    _, many, bad = opened(path, encoder, monkeypatch)
    assert [shown(part) for part in many] == [shown(part) for part in few]
    assert [row.source for row in bad.first] == ["a.jsonl:41"]


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


def test_one_process_waits_for_the_other(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, said = written(tmp_path / "a.jsonl"), list[str]()
    monkeypatch.setattr(load, "LARGE", 1)
    waits = threading.Event()

    def say(share: float, text: str) -> None:
        said.append(text)
        if text.startswith("waiting for another process"):
            waits.set()

    source = file_source(path)
    with row_cache.cached_folder(source, ["found", []], say):
        other = threading.Thread(target=load_data, args=(str(path), 0.2, 1, {}, "drop", say))
        other.start()
        assert waits.wait(10)
    other.join(10)
    assert said[-1] == "42 rows"


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


def test_without_a_cache_rows_are_kept_as_long_as_the_process_lives(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.jsonl")
    wanted = [shown(part) for part in opened(path, encoder, monkeypatch, large=False)[1]]
    (tmp_path / "cache").write_text("a file")
    assert [shown(part) for part in opened(path, encoder, monkeypatch)[1]] == wanted
    load_rows(Options(data=str(path), on_bad_row="drop"), Display())
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"rows cannot be kept for the next start: (Not a directory|File exists): \S*cache", said)


def test_a_disk_that_refuses_is_named(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    path = written(tmp_path / "a.jsonl")
    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(UserError, match=r"No space left on device: .*part-000000") as caught:
        opened(path, encoder, monkeypatch)
    assert caught.value.fix.startswith("Free space on that disk, then start again")


def test_work_grows_as_the_rows_do(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four times the rows, at most eight times the seconds (their square is 16), in every step from file to hash."""

    def seconds(count: int) -> list[float]:
        path = tmp_path / f"{count}.jsonl"
        same = [chat("The same", f"Answer {number % 7}.") for number in range(count // 2)]  # one prompt of many rows
        same += [{"text": "Plain text that is cut. " * 9}] * (count // 10)
        rows = [*same, *(chat(f"Question {number}?", f"Answer {number}.") for number in range(count // 2))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        times = [time.process_time()]
        data = load_data(str(path), 0.1, 1)
        times.append(time.process_time())
        quality_warnings(data)
        times.append(time.process_time())
        parts, _ = encode_parts((data.train, data.valid), encoder, "error")
        times.append(time.process_time())
        for overflow in ("truncate", "split"):
            rows_hash(filter_by_length(parts[0], 30, overflow).rows)
        times.append(time.process_time())
        return np.diff(times).tolist()

    monkeypatch.setattr(load, "LARGE", 1)
    monkeypatch.setattr(row_parts, "_CHUNK_ROWS", 64)
    monkeypatch.setattr(row_parts, "_PART_ROWS", 256)
    few, many = (np.min([seconds(count + extra) for extra in range(3)], axis=0) for count in (500, 2000))
    assert (many < 8 * few + 0.05).all(), (few, many)


def test_what_is_known_of_rows_is_looked_through_in_linear_time(tmp_path: Path) -> None:
    """As above, of so many rows that a step takes far more than the clock's noise."""

    def seconds(count: int) -> list[float]:
        random = np.random.default_rng(count)
        keys = random.integers(0, count // 2, (2, count)).astype(np.uint64)
        keys[1, : count // 2] = 7  # one prompt of many rows
        begun = random.integers(0, count // 2, (count, 2)).astype(np.uint64)
        facts = Facts(
            keys[0],
            begun,
            keys[1],
            random.integers(0, 256, (count, 32), np.uint8),
            random.integers(0, 8, count, np.uint8),
        )
        numbers = np.arange(count)
        rows = FileRows(file_source(tmp_path / "a.jsonl"), {}, facts, numbers, np.array([count]), numbers)
        lengths = random.integers(5, 60, count).astype(np.int32)
        ids = np.ones(lengths.sum(), np.int32)
        ones, kinds = np.ones(count, np.float32), np.zeros(count, np.int32)
        flat = FlatRows(ids, ids > 0, lengths, lengths - 1, ones, ones, facts.digests, kinds, [Kind((), (), True, ())])
        encoded = EncodedRows.every(Store([flat], Sources("a.jsonl", numbers)))
        times = [time.process_time()]
        train, valid = load._split_validation(rows, 0.1, 1)
        times.append(time.process_time())
        quality_warnings(Dataset(train, valid, []))
        times.append(time.process_time())
        for overflow in ("drop", "truncate", "split"):
            rows_hash(filter_by_length(encoded, 55, overflow).rows)
        times.append(time.process_time())
        return np.diff(times).tolist()

    few, many = (np.min([seconds(count + extra) for extra in range(3)], axis=0) for count in (30_000, 120_000))
    assert (many < 8 * few).all(), (few, many)


@pytest.mark.parametrize("given", [json.dumps(chat("a" * 100_000, "b")).encode(), chat("a" * 100_000, "b")])
def test_long_rows_are_worked_on_few_at_a_time(given: Any) -> None:
    chunks = [*row_parts._chunks(iter([(number, given) for number in range(30)]))]
    assert max(len(chunk) for chunk, _ in chunks) == 3
    assert all(size < 1 << 19 for _, size in chunks)
    assert [number for chunk, _ in chunks for number, _ in chunk] == [*range(30)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_it_is_known_how_much_is_read(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(row_parts, "_CHUNK_ROWS", 256)
    monkeypatch.setattr(row_parts, "_PART_ROWS", 1 << 20)
    rows = [{"text": f"{number} " * 200} for number in range(4000)]
    path, texts = tmp_path / name, [row["text"] for row in rows]
    if name == "a.parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        lines = map(json.dumps, rows) if name == "a.jsonl" else ["text", *texts] if name == "a.csv" else texts
        path.write_text(("\n\n" if name == "a.txt" else "\n").join(lines))
    monkeypatch.setattr(load, "LARGE", 1)
    shares = list[float]()
    load_data(str(path), 0, 1, progress=lambda share, text: shares.append(share) if "rows" in text else None)
    assert shares == sorted(shares)
    assert len({*shares} - {0, 1}) > 2
    assert shares[-1] > 0.9


@pytest.mark.parametrize("rows_in_group", [1000, 40_000])
def test_a_parquet_file_is_read_in_pieces(rows_in_group: int, tmp_path: Path) -> None:
    rows = [{"text": f"{number} is a number of {number % 97} texts. " * 20} for number in range(40_000)]
    parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        tmp_path / "a.parquet",
        row_group_size=rows_in_group,
        compression="none",
        use_dictionary=False,
    )
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        assert sum(1 for _ in file_source(tmp_path / "a.parquet").rows()) == 40_000
    finally:
        pyarrow.set_memory_pool(before)
    assert 0 < pool.max_memory() < (tmp_path / "a.parquet").stat().st_size / 2


def test_pictures_are_not_carried_along(tmp_path: Path) -> None:
    rows = [{"text": "Hello.", "image": {"bytes": b"0" * 1_000_000, "path": "a.png"}} for _ in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none")
    found = [row for _, row in file_source(tmp_path / "a.parquet").rows()]
    assert found == [{"text": "Hello.", "image": {"bytes": b"", "path": "a.png"}}] * 40
    assert arrow_rows._together(40, 40_000_000) == 1


def test_bad_rows_are_counted_and_the_first_are_kept(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(row_parts, "_CHUNK_ROWS", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" * 3000 + json.dumps(chat("Question", "Yes.")))
    for large in (False, True):
        data, _, _ = opened(path, encoder, monkeypatch, large)
        assert (len(data.bad), len(data.bad.first)) == (3000, 1000)
        assert data.bad.first[-1][0] == "a.jsonl line 1000"


def test_a_dataset_of_lists_needs_no_file(encoder: Encoder) -> None:
    assert quality_warnings(Dataset([], [], [])) == []
    assert [*EncodedRows.of([])] == []
    row = Encoded(np.arange(3, dtype=np.int32), np.array([False, True, True]), "a:1")
    assert shown(EncodedRows.of([row])[:1]) == shown(EncodedRows.of([row]))

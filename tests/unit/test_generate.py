"""`generate RUN`: prompts in every shape, an output that is complete or absent, a stopped job that continues."""

import json
import os
import resource
import sys
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.commands import generate as answers
from common.commands.generate import Answers, generate
from common.data.load import read_rows
from common.errors import Refusal, UserError
from common.inference import answers as inference
from common.inference.backend_chat import ChatModel
from common.inference.chat_models import ChatModels, Target, choose
from common.inference.prompts import read_prompts
from common.run_record import Run
from common.sampling import Sampling
from tests.contexts import context


def asked(path: Path, system: str | None = None) -> list[list[str]]:
    return [[f"{m['role']}: {m['content']}" for m in row.messages] for row in read_prompts(path, system)]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "p"}, ["user: p"]),
        ({"prompt": "p", "completion": "c"}, ["user: p"]),
        ({"question": "p", "answer": ""}, ["user: p"]),
        ({"prompt": "p", "completion": "c", "train": False, "weight": 7}, ["user: p"]),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ["user: p"]),
        ({"prompt": "p", "completion": "c", "label": False}, ["user: p"]),
        ({"instruction": "i", "input": "x", "output": "o", "system": "S"}, ["system: S", "user: i\n\nx"]),
        ({"instruction": "i", "input": ""}, ["user: i"]),
        ({"Question": "q"}, ["user: q"]),
        ({"質問": "q", "回答": ""}, ["user: q"]),
        ({"messages": [{"role": "user", "content": "u"}]}, ["user: u"]),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            ["user: u"],
        ),
        (
            {"messages": [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user", "assistant")]},
            ["system: s", "user: u", "assistant: a", "user: u"],
        ),
        ({"text": "t"}, ["user: t"]),
    ],
)
def test_prompts_of_every_shape(tmp_path: Path, row: dict, turns: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert asked(tmp_path / "p.jsonl") == [turns]


def test_a_prompt_a_line_and_a_system_prompt_for_those_without(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  \n二つ目\n", encoding="utf-8")
    assert asked(tmp_path / "p.txt", "S") == [["system: S", "user: one"], ["system: S", "user: 二つ目"]]
    (tmp_path / "p.txt").write_bytes("one\x0ctwo\u2028three\x85four\r\nfive".encode())
    assert asked(tmp_path / "p.txt") == [["user: one\x0ctwo\u2028three\x85four"], ["user: five"]]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "p", "system": "own"}) + "\n")
    assert asked(tmp_path / "p.jsonl", "S") == [["system: own", "user: p"]]


def test_bad_prompts_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_prompts(path)
    path.write_text('{"prompt": "a"}\n{"x": 1}\n[]\n{"messages": []}\nno\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert caught.value.what.startswith(f"--prompts {path} has 4 bad rows:\np.jsonl line 2: has none of messages")
    assert "p.jsonl line 5: is not JSON" in caught.value.what
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(path)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`go(fail_at)`: three prompts to a GGUF whose model fails at a prompt; what was asked of it is in `go.seen`."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "p.txt").write_text("a\nb\nc\n")

    def go(fail_at: str = "", slots: int = 1, refuse: str = "", length: int = 512, **sampling: Any) -> None:
        def answer(messages, sampling, tools):
            text = messages[-1]["content"]
            go.seen.append((text, sampling.seed))  # type: ignore[attr-defined]
            if text == fail_at:
                raise UserError("the server died", "Look.")
            if text in refuse.split():
                raise Refusal(f"{text} is too long", "Give a larger --context.")
            yield f"{text}?", None
            yield "", "length" if text == "b" else "stop"

        @contextmanager
        def opened(*arguments):
            yield ChatModels(ChatModel("m", answer), lambda: ChatModel("m", answer))

        monkeypatch.setattr(answers, "opened", opened)
        wanted = Answers(read_prompts(tmp_path / "p.txt"), tmp_path / go.out, length, slots)  # type: ignore[attr-defined]
        target = choose(go.model, None, None)  # type: ignore[attr-defined]
        no_backend = context("plain", lambda: pytest.fail("no backend is wanted"))
        generate(target, wanted, Sampling(**({"seed": 5} | sampling)), no_backend)

    go.seen = []  # type: ignore[attr-defined]
    go.folder, go.out, go.model = tmp_path, "out.jsonl", tmp_path / "m.gguf"  # type: ignore[attr-defined]
    return go


@pytest.mark.parametrize("slots", [1, 3])
def test_answers_are_rows_in_the_order_of_the_prompts(job: Any, slots: int, capsys: pytest.CaptureFixture[str]) -> None:
    job(slots=slots)
    rows = read_rows(job.folder / "out.jsonl")
    assert [[m["content"] for m in row.messages] for row in rows] == [["a", "a?"], ["b", "b?"], ["c", "c?"]]
    finishes = [json.loads(line)["finish"] for line in (job.folder / "out.jsonl").read_text().splitlines()]
    assert finishes == ["stop", "length", "stop"]
    assert sorted(job.seen) == [("a", 5), ("b", 6), ("c", 7)]
    assert "1 were cut at --max-tokens" in capsys.readouterr().out
    assert sorted(path.name for path in job.folder.iterdir()) == ["m.gguf", "out.jsonl", "p.txt"]
    with pytest.raises(UserError, match="exists already"):
        job()


def test_a_name_that_leaves_no_room_for_a_temporary_one_is_written(job: Any) -> None:
    job.out = "答" * 73 + ".jsonl"
    job()
    assert len(read_rows(job.folder / job.out)) == 3
    assert len(list(job.folder.iterdir())) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="macOS takes no such name")
def test_a_job_with_a_folder_that_is_no_utf_8_goes_on(job: Any) -> None:
    folder = job.folder / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    job.model, job.out = job.model.rename(folder / "m.gguf"), str(folder / "out.jsonl")
    with pytest.raises(UserError, match="the server died"):
        job(fail_at="b")
    job()
    assert [text for text, _ in job.seen] == ["a", "b", "b", "c"]
    assert len(read_rows(folder / "out.jsonl")) == 3


def test_a_stopped_job_goes_on(job: Any) -> None:
    with pytest.raises(UserError, match="the server died"):
        job(fail_at="c")
    assert not (job.folder / "out.jsonl").exists()
    part = job.folder / "out.jsonl.part"
    part.write_text(part.read_text().rstrip("\n")[:-5])  # killed while it wrote b's
    with pytest.raises(UserError, match="other prompts, or other settings"):
        job(top_k=7)
    job.seen.clear()
    job()
    assert [text for text, _ in job.seen] == ["b", "c"]
    assert len(read_rows(job.folder / "out.jsonl")) == 3
    assert not part.exists()


def test_a_job_without_an_answer_leaves_nothing_and_binds_nobody(job: Any) -> None:
    part = job.folder / "out.jsonl.part"
    with pytest.raises(UserError, match="the server died"):
        job(fail_at="a")
    assert not part.exists()
    part.write_text('{"asked": "by a process that was killed at its start"}\n')
    (job.folder / "out.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        job()
    (job.folder / "out.jsonl").unlink()
    part.write_text('{"asked": "by a process that was killed at its start"}\n')
    job()
    assert len(read_rows(job.folder / "out.jsonl")) == 3


@pytest.mark.parametrize("kind", ["adapter", "fused", "base"])
def test_a_runs_answers_outlive_what_is_put_on_record(kind: Any, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.update(status="complete", recipe_hash="r", model_hash="m", options={}, stop_ids=[], exported_step=5)

    def key() -> dict[str, str]:
        return answers._asked_for(Target(kind, run.path, run, ""), [], Sampling())

    before = key()
    run.update(pushed={"repo": "me/pip"}, stage_seconds={"verify": 1.0})
    assert key() == before
    run.update_export(fuse_into="dequantized")
    assert (key() == before) == (kind != "fused")
    run.update(exported_step=7)
    assert key() != before


@pytest.mark.parametrize("slots", [1, 3])
def test_a_refused_prompt_stops_no_job_and_a_larger_context_asks_it_alone(job: Any, slots: int) -> None:
    with pytest.raises(UserError) as caught:
        job(refuse="a c", slots=slots)
    out, part = job.folder / "out.jsonl", job.folder / "out.jsonl.part"
    assert caught.value.what == (
        f'2 of 3 prompts were refused; in {out} they have "finish": "error":\n'
        "p.txt:1: a is too long\np.txt:3: c is too long"
    )
    assert "--context" in caught.value.fix
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["finish"] for row in rows] == ["error", "length", "error"]
    assert (rows[0]["error"], len(rows[0]["messages"]), len(rows[1]["messages"])) == ("a is too long", 1, 2)
    job.seen.clear()
    with pytest.raises(UserError, match="1 of 3 prompts were refused"):
        job(refuse="c", slots=slots, length=1024)
    assert sorted(text for text, _ in job.seen) == ["a", "c"]
    job.seen.clear()
    job(slots=slots, length=2048)
    assert [text for text, _ in job.seen] == ["c"]
    assert [[m["content"] for m in row.messages] for row in read_rows(out)] == [["a", "a?"], ["b", "b?"], ["c", "c?"]]
    assert not part.exists()


def test_a_stop_keeps_every_answer_that_is_there(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(jobs: list[Any]) -> Any:
        assert wait(jobs, 30).not_done == set()
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "as_completed", stop)
    with pytest.raises(KeyboardInterrupt):
        job(slots=3)
    assert len((job.folder / "out.jsonl.part").read_text().splitlines()) == 1 + 3


def test_a_second_process_is_refused(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_all = answers.ask_all

    def again(*arguments: Any) -> None:
        monkeypatch.setattr(answers, "ask_all", ask_all)
        with pytest.raises(UserError, match=r"Another process is answering into .*out\.jsonl\."):
            job()
        ask_all(*arguments)

    monkeypatch.setattr(answers, "ask_all", again)
    job()
    assert sorted(path.name for path in job.folder.iterdir()) == ["m.gguf", "out.jsonl", "p.txt"]


def test_one_that_finished_just_now_is_not_answered_again(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(descriptor: int) -> bool:
        (job.folder / "out.jsonl.part").unlink()
        return True

    monkeypatch.setattr(answers, "try_lock", late)
    with pytest.raises(UserError, match="Another process"):
        job()


def test_a_full_disk_names_the_part(job: Any) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (job.folder / "p.txt").write_text("a\n" + "b" * 2_000_000 + "\nc\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            job()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    part = job.folder / "out.jsonl.part"
    assert caught.value.filename == str(part)
    job.seen.clear()
    job()
    assert [text[0] for text, _ in job.seen] == ["b", "c"]


@pytest.mark.parametrize(
    ("number", "line", "words"),
    [
        (0, b"{", "line 1 is not JSON"),
        (0, b"[]", r"line 1 is not a JSON object\."),
        (0, b"\xff", "line 1 is not JSON"),
        (1, b'{"number": 0, "ro', "line 2 is not JSON"),
        (1, b'{"number": 0}', r"line 2 holds no answer\."),
        (1, b'{"number": "0", "row": {"finish": "stop"}}', r"line 2 holds no answer\."),
        (1, b'{"number": 0, "row": {}}', r"line 2 holds no answer\."),
    ],
)
def test_a_damaged_part_is_named(job: Any, number: int, line: bytes, words: str) -> None:
    with pytest.raises(UserError, match="the server died"):
        job(fail_at="b")
    part = job.folder / "out.jsonl.part"
    lines = part.read_bytes().split(b"\n")
    lines[number] = line
    part.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=words) as caught:
        job()
    assert caught.value.fix == "Remove it, or give another --out."
    assert part.read_bytes() == b"\n".join(lines)

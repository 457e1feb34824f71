"""The talk: its commands, what it keeps, and Ctrl-C."""

import json
import signal
from pathlib import Path

import pytest

from common.commands.chat import ChatSession, converse
from common.data.load import read_rows
from common.display import Display
from common.errors import UserError
from common.inference.backend_chat import ChatModel
from common.inference.chat_models import ChatModels
from common.inference.prompts import system_text
from common.sampling import Sampling


class Said:
    """A model that answers with what was asked last, and notes what it was asked; `at`: where Ctrl-C comes."""

    def __init__(self, name: str, finish: str = "stop") -> None:
        self.asked: list[list[dict]] = []
        self.finish, self.interrupted_at, self.closed = finish, -1, 0
        self.model = ChatModel(name, self.answer)

    def answer(self, messages, sampling, tools):
        self.asked.append([dict(message) for message in messages])
        try:
            for number, word in enumerate(f"{self.model.name} heard {messages[-1]['content']}".split(" ")):
                if number == self.interrupted_at:
                    signal.raise_signal(signal.SIGINT)
                yield (" " if number else "") + word, None
            yield "", self.finish
        finally:
            self.closed += 1


@pytest.fixture
def tuned() -> Said:
    return Said("tuned")


@pytest.fixture
def base() -> Said:
    return Said("base")


@pytest.fixture
def talk(tuned: Said, base: Said) -> ChatSession:
    return ChatSession(ChatModels(tuned.model, lambda: base.model), Sampling(), Display("plain"), "Be short.")


SYSTEM = {"role": "system", "content": "Be short."}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def test_turns_add_up_and_reset_forgets_them(
    talk: ChatSession, tuned: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk.handle("one")
    assert talk.handle("二つ目")
    assert talk.handle("   ")
    assert tuned.asked[1] == [SYSTEM, turn("user", "one"), turn("assistant", "tuned heard one"), turn("user", "二つ目")]
    assert "tuned heard 二つ目\n" in capsys.readouterr().out
    talk.handle("/reset")
    talk.handle("anew")
    assert tuned.asked[-1] == [SYSTEM, turn("user", "anew")]
    assert not talk.handle("/quit")


def test_the_system_prompt_changes_on_the_way(talk: ChatSession, tuned: Said, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("港のオウム\n", encoding="utf-8")
    talk.handle(f"/system @{tmp_path / 'system.txt'}")
    talk.handle("a")
    assert tuned.asked[0][0] == turn("system", "港のオウム")
    talk.handle("/system none")
    talk.handle("b")
    assert [message["role"] for message in tuned.asked[1]] == ["user", "assistant", "user"]
    with pytest.raises(UserError, match="file nowhere cannot be read"):
        talk.handle("/system @nowhere")
    assert talk.system is None


def test_a_saved_talk_is_a_training_row_and_loads_again(talk: ChatSession, base: Said, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}), encoding="utf-8")  # its line has no end
    talk.handle("日本語\nで")
    talk.handle(f"/save {path}")
    talk.handle("/reset")
    talk.handle("again")
    talk.handle(f"/save {path}")
    rows = read_rows(path)
    assert [row.messages for row in rows[1:]] == [
        (SYSTEM, turn("user", "日本語\nで"), turn("assistant", "tuned heard 日本語\nで")),
        (SYSTEM, turn("user", "again"), turn("assistant", "tuned heard again")),
    ]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    talk.handle(f"/load {path} 2")
    assert (talk.system, talk.turns[0]["content"]) == ("Be short.", "日本語\nで")
    talk.handle(f"/load {path}")
    assert talk.turns[0]["content"] == "again"
    talk.handle(f"/load {path} 1")
    assert talk.said() == [turn("user", "p"), turn("assistant", "c")]
    for line, why in (
        (f"/load {path} 4", "has 3 rows"),
        ("/load gone.jsonl", "no such file"),
        ("/load", "no such file"),
    ):
        with pytest.raises(UserError, match=why):
            talk.handle(line)
    assert talk.said() == [turn("user", "p"), turn("assistant", "c")]


def test_what_cannot_be_saved_is_said(talk: ChatSession, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole answer yet"):
        talk.handle(f"/save {tmp_path / 'a.jsonl'}")
    talk.handle("a")
    for name in ("", "talks.txt"):
        with pytest.raises(UserError, match="talks are kept as JSONL"):
            talk.handle(f"/save {tmp_path / name}")
    with pytest.raises(UserError, match="/sav is no command"):
        talk.handle("/sav a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_and_not_the_talk(
    talk: ChatSession, tuned: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned.interrupted_at = 2
    lines = iter(["first question", f"/save {tmp_path / 'a.jsonl'}", "second"])

    def read() -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        if line == "second":
            tuned.interrupted_at = -1
        return line

    converse(talk, read)
    said = capsys.readouterr().out
    assert "tuned heard\n(stopped)\n" in said
    assert "warning: There is no whole answer yet" in said
    assert tuned.closed == 2
    assert talk.turns[1] == turn("assistant", "tuned heard", train=False)
    talk.handle(f"/save {tmp_path / 'a.jsonl'}")
    (row,) = read_rows(tmp_path / "a.jsonl")  # the answer that was broken off is context, and carries no loss
    assert [message.get("train", True) for message in row.messages] == [True, True, False, True, True]


def test_ctrl_c_before_the_first_word_forgets_the_question(talk: ChatSession, tuned: Said) -> None:
    tuned.interrupted_at = 0
    talk.handle("slow")
    assert talk.turns == []


def test_ctrl_c_at_the_prompt_is_no_end(talk: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def read() -> str:
        calls.append(1)
        raise KeyboardInterrupt if len(calls) == 1 else EOFError

    converse(talk, read)
    assert len(calls) == 2
    assert "(Ctrl-D or /quit ends the talk)" in capsys.readouterr().out


def test_an_answer_cut_by_its_limit_carries_no_loss(
    talk: ChatSession, tuned: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned.finish = "length"
    talk.handle("a")
    assert talk.turns[1]["train"] is False
    assert "(cut at --max-tokens or --context)" in capsys.readouterr().out


def test_compare_asks_both_the_same(
    talk: ChatSession, tuned: Said, base: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="nothing was asked yet"):
        talk.handle("/compare")
    talk.handle("/compare new")
    assert base.asked == tuned.asked == [[SYSTEM, turn("user", "new")]]
    assert talk.turns == [turn("user", "new"), turn("assistant", "tuned heard new")]
    said = capsys.readouterr().out
    assert "base heard new" in said
    assert "tuned heard new" in said
    talk.handle("/compare")  # the last question again: the talk stays as it is
    assert base.asked[1] == tuned.asked[1] == [SYSTEM, turn("user", "new")]
    assert len(talk.turns) == 2


def test_a_fault_is_told_and_nothing_is_kept(
    talk: ChatSession, tuned: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(messages, sampling, tools):
        raise UserError("llama-server refused: too long", "Start again.")
        yield

    talk.models = ChatModels(ChatModel("broken", broken), talk.models.base)
    lines = iter(["long"])
    converse(talk, lambda: next(lines, "/quit"))
    assert talk.turns == []
    assert "warning: llama-server refused: too long\n  Start again." in capsys.readouterr().out


def test_an_answer_cannot_steer_the_terminal(talk: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    talk.handle("\x1b[2Jred\x07")
    said = capsys.readouterr().out
    assert "tuned heard [2Jred" in said
    assert "\x1b" not in said
    assert talk.turns[1]["content"] == "tuned heard \x1b[2Jred\x07"


def test_where_a_system_prompt_comes_from(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text(" You are Pip.\n")
    assert system_text(None) is None
    assert system_text("You are Pip.") == "You are Pip."
    assert system_text(f"@{tmp_path / 's.txt'}") == system_text(None, tmp_path / "s.txt") == "You are Pip."
    with pytest.raises(UserError, match="--system and --system-file are both given"):
        system_text("a", tmp_path / "s.txt")
    (tmp_path / "s.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        system_text(None, tmp_path / "s.txt")

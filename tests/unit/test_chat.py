"""A chat session: its commands, what it keeps, and Ctrl-C."""

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from common.commands import chat as module
from common.commands.chat import ChatSession, converse, history_of
from common.data.load import read_rows
from common.display import Display
from common.errors import Ended, Refusal, UserError
from common.inference.backend_chat import ChatModel
from common.inference.chat_models import ChatModels
from common.inference.prompts import system_text
from common.sampling import Sampling


class Echo:
    """A model that answers with what was asked last, and notes what it was asked; `at`: where Ctrl-C comes."""

    def __init__(self, name: str, finish: str = "stop") -> None:
        self.asked: list[list[dict]] = []
        self.tools: list[tuple] = []
        self.finish, self.interrupted_at, self.closed = finish, -1, 0
        self.model = ChatModel(name, self.answer)

    def answer(self, messages, sampling, tools):
        self.asked.append([dict(message) for message in messages])
        self.tools.append(tuple(tools))
        try:
            for number, word in enumerate(f"{self.model.name} heard {messages[-1]['content']}".split(" ")):
                if number == self.interrupted_at:
                    signal.raise_signal(signal.SIGINT)
                yield (" " if number else "") + word, None
            yield "", self.finish
        finally:
            self.closed += 1


@pytest.fixture
def tuned() -> Echo:
    return Echo("tuned")


@pytest.fixture
def base() -> Echo:
    return Echo("base")


@pytest.fixture
def session(tuned: Echo, base: Echo) -> ChatSession:
    return ChatSession(ChatModels(tuned.model, lambda: base.model), Sampling(), Display("plain"), "Be short.")


SYSTEM = {"role": "system", "content": "Be short."}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def test_turns_add_up_and_reset_forgets_them(
    session: ChatSession, tuned: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session.handle("one")
    assert session.handle("二つ目")
    assert session.handle("   ")
    assert tuned.asked[1] == [SYSTEM, turn("user", "one"), turn("assistant", "tuned heard one"), turn("user", "二つ目")]
    assert "tuned heard 二つ目\n" in capsys.readouterr().out
    session.handle("/reset")
    session.handle("again")
    assert tuned.asked[-1] == [SYSTEM, turn("user", "again")]
    assert not session.handle("/quit")


def test_the_system_prompt_changes_on_the_way(session: ChatSession, tuned: Echo, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("港のオウム\n", encoding="utf-8")
    session.handle(f"/system @{tmp_path / 'system.txt'}")
    session.handle("a")
    assert tuned.asked[0][0] == turn("system", "港のオウム")
    session.handle("/system none")
    session.handle("b")
    assert [message["role"] for message in tuned.asked[1]] == ["user", "assistant", "user"]
    with pytest.raises(UserError, match="file nowhere cannot be read"):
        session.handle("/system @nowhere")
    assert session.system is None


def test_a_saved_session_is_a_training_row_and_loads_again(session: ChatSession, base: Echo, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c"}), encoding="utf-8")  # its line has no end
    session.handle("日本語\nで")
    session.handle(f"/save {path}")
    session.handle("/reset")
    session.handle("again")
    session.handle(f"/save {path}")
    rows = read_rows(path)
    assert [row.messages for row in rows[1:]] == [
        (SYSTEM, turn("user", "日本語\nで"), turn("assistant", "tuned heard 日本語\nで")),
        (SYSTEM, turn("user", "again"), turn("assistant", "tuned heard again")),
    ]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    session.handle(f"/load {path} 2")
    assert (session.system, session.turns[0]["content"]) == ("Be short.", "日本語\nで")
    session.handle(f"/load {path}")
    assert session.turns[0]["content"] == "again"
    session.handle(f"/load {path} 1")
    assert session.messages() == [turn("user", "p"), turn("assistant", "c")]
    for line, why in (
        (f"/load {path} 4", "has 3 rows"),
        ("/load gone.jsonl", "no such file"),
        ("/load", "no such file"),
    ):
        with pytest.raises(UserError, match=why):
            session.handle(line)
    assert session.messages() == [turn("user", "p"), turn("assistant", "c")]


def test_a_loaded_row_keeps_its_tools(session: ChatSession, tuned: Echo, base: Echo, tmp_path: Path) -> None:
    path, tool = tmp_path / "a.jsonl", {"type": "function", "function": {"name": "tide", "parameters": {}}}
    call = {"type": "function", "function": {"name": "tide", "arguments": {}}}
    turns = [turn("user", "Tide?"), turn("assistant", "", tool_calls=[call]), turn("tool", "high")]
    row = {"messages": [*turns, turn("assistant", "High.")], "tools": [tool]}
    path.write_text(json.dumps(row) + "\n")
    session.handle(f"/load {path}")
    session.handle("And now?")
    session.handle("/compare")
    assert tuned.tools == [(tool,), (tool,)]
    assert base.tools == [(tool,)]
    session.handle(f"/save {path}")
    assert read_rows(path)[1].tools == (tool,)
    session.handle("/reset")
    session.handle("Hello")
    assert tuned.tools[-1] == ()
    assert "tools" not in session.row()


def test_what_cannot_be_saved_is_reported(session: ChatSession, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete answer yet"):
        session.handle(f"/save {tmp_path / 'a.jsonl'}")
    session.handle("a")
    for name in ("", "chats.txt"):
        with pytest.raises(UserError, match="sessions are saved as JSONL"):
            session.handle(f"/save {tmp_path / name}")
    with pytest.raises(UserError, match="/sav is not a command"):
        session.handle("/sav a.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_and_not_the_session(
    session: ChatSession, tuned: Echo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned.interrupted_at = 2
    lines = iter(["first question", f"/save {tmp_path / 'a.jsonl'}", "second"])

    def read() -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        if line == "second":
            tuned.interrupted_at = -1
        return line

    converse(session, read)
    out = capsys.readouterr().out
    assert "tuned heard\n(stopped)\n" in out
    assert "warning: There is no complete answer yet" in out
    assert tuned.closed == 2
    assert session.turns[1] == turn("assistant", "tuned heard", train=False)
    session.handle(f"/save {tmp_path / 'a.jsonl'}")
    (row,) = read_rows(tmp_path / "a.jsonl")  # the answer that was broken off is context, and carries no loss
    assert [message.get("train", True) for message in row.messages] == [True, True, False, True, True]


def test_ctrl_c_before_the_first_word_forgets_the_question(session: ChatSession, tuned: Echo) -> None:
    tuned.interrupted_at = 0
    session.handle("slow")
    assert session.turns == []


def test_ctrl_c_at_the_prompt_does_not_end_it(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def read() -> str:
        calls.append(1)
        raise KeyboardInterrupt if len(calls) == 1 else EOFError

    converse(session, read)
    assert len(calls) == 2
    assert "(Ctrl-D or /quit ends the session)" in capsys.readouterr().out


def test_an_answer_cut_by_its_limit_carries_no_loss(
    session: ChatSession, tuned: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned.finish = "length"
    session.handle("a")
    assert session.turns[1]["train"] is False
    assert "(cut at --max-tokens or --context)" in capsys.readouterr().out


def test_compare_asks_both_the_same(
    session: ChatSession, tuned: Echo, base: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no question yet"):
        session.handle("/compare")
    session.handle("/compare new")
    assert base.asked == tuned.asked == [[SYSTEM, turn("user", "new")]]
    assert session.turns == [turn("user", "new"), turn("assistant", "tuned heard new")]
    out = capsys.readouterr().out
    assert "base heard new" in out
    assert "tuned heard new" in out
    session.handle("/compare")  # the last question again: the session stays as it is
    assert base.asked[1] == tuned.asked[1] == [SYSTEM, turn("user", "new")]
    assert len(session.turns) == 2


def test_an_error_is_shown_and_nothing_is_kept(
    session: ChatSession, tuned: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(messages, sampling, tools):
        raise UserError("llama-server refused: too long", "Start again.")
        yield

    session.models = ChatModels(ChatModel("broken", broken), session.models.base)
    lines = iter(["long"])
    converse(session, lambda: next(lines, "/quit"))
    assert session.turns == []
    assert "warning: llama-server refused: too long\n  Start again." in capsys.readouterr().out


def test_a_server_that_has_died_ends_the_session(session: ChatSession) -> None:
    def dead(messages, sampling, tools):
        raise Ended("llama-server with m.gguf broke off its answer.", "Look.")
        yield

    session.models = ChatModels(ChatModel("dead", dead), session.models.base)
    lines = iter(["one", "two"])
    with pytest.raises(Ended, match="broke off its answer"):
        converse(session, lambda: next(lines))
    assert list(lines) == ["two"]


def test_piped_lines_must_be_utf_8(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="Standard input is not UTF-8 text: invalid continuation byte"):
        converse(session, module._reader(True))


def test_the_history_is_kept_where_it_can_be_and_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    history_of(False).append_string("secret")
    assert list(tmp_path.iterdir()) == []
    history_of(True).append_string("hello")
    kept = tmp_path / "cache" / "chat-history"
    assert "hello" in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(module, "cache_folder", lambda: kept)  # no folder: nothing can be written there
    history = history_of(True)
    history.append_string("again")
    assert history.get_strings() == ["again"]


def test_an_answer_cannot_steer_the_terminal(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.handle("\x1b[2Jred\x07")
    out = capsys.readouterr().out
    assert r"tuned heard \x1b[2Jred\x07" in out
    assert "\x1b" not in out
    assert session.turns[1]["content"] == "tuned heard \x1b[2Jred\x07"


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


def test_a_refused_turn_names_what_helps_here(
    session: ChatSession, tuned: Echo, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(messages, sampling, tools):
        raise Refusal("These turns are too long.", "Give a larger --context.")
        yield

    session.models = ChatModels(ChatModel("tuned", refuse), session.models.base)
    lines = iter(["hello"])

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(session, read)
    said = capsys.readouterr().out
    assert "warning: These turns are too long.\n  Give a larger --context. Or start again: /reset" in said

"""The server's client: a stream of events, one that breaks off, and ports."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from common.errors import Ended, UserError
from common.llama_cpp import server as server_module
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions, for_llama_cpp
from common.sampling import Sampling
from common.system.ports import address_of, free_port
from tests import ROOT
from tests.llama_server import llama_server

STREAMING = """
    def event(self, value): self.wfile.write(f"data: {json.dumps(value)}\\n\\n".encode()); self.wfile.flush()
    def delta(self, text): self.event({"choices": [{"delta": {"content": text}, "finish_reason": None}]})
    def answer(self, body):
        text = body["messages"][-1]["content"]
        if text == "long": return self.send({"error": {"message": "it exceeds the available context size"}}, 400)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8"); self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
        self.delta("港の"); self.delta(f"{body['temperature']} {body['stream']} {body['chat_template_kwargs']}")
        if text == "error": return self.event({"error": {"message": "out of slots"}})
        if text == "cut": return
        if text == "die": print("sorry", flush=True); os._exit(1)
        if text == "slow":
            try:
                while True: self.delta("a"); time.sleep(0.01)
            except OSError: open(os.environ["NOTE"], "w").write("closed")
            return
        self.wfile.write(b': comment\\r\\nevent: message\\r\\n')
        self.wfile.write(b'data: {"choices":\\r\\ndata: []}\\r\\n\\r\\nretry: 5\\n\\n')
        self.event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.wfile.write(b"data: [DONE]\\n\\n")
print("flags", *sys.argv[1:], flush=True)
"""


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    return llama_server(tmp_path, STREAMING)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_streams_and_says_how_it_ended(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(
        llama, tmp_path / "m.gguf", ServerOptions(timeout=60, template=tmp_path / "t.jinja", flags=("--x", "1"))
    ) as server:
        pieces = list(server.stream(ask("a"), Sampling(temperature=0.25), enable_thinking=False))
        flags = server._output[0].split()
    assert pieces == [("港の", None), ("0.25 True {'enable_thinking': False}", None), ("", "length")]
    assert flags[flags.index("--chat-template-file") + 1] == str(tmp_path / "t.jinja")
    assert flags[flags.index("--host") + 1] == "127.0.0.1"
    assert flags[flags.index("--x") + 1] == "1"
    assert "--reasoning-format" not in flags


@pytest.mark.parametrize("arguments", [{"city": "京都"}, '{"city": "京都"}'])
def test_the_arguments_of_a_call_are_encoded_once(arguments: object) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    found = for_llama_cpp({"role": "assistant", "content": "", "tool_calls": [call], "weight": 2.0})
    function = {"name": "weather", "arguments": '{"city": "京都"}'}
    assert found == {"role": "assistant", "content": "", "tool_calls": [{"id": "0", **call, "function": function}]}
    assert call["function"]["arguments"] == arguments


def test_half_of_a_surrogate_pair_is_sent_as_it_is(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        assert len(list(server.stream(ask("\ud83d"), Sampling()))) == 3


def test_faults_of_a_stream_are_told_in_the_servers_words(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        with pytest.raises(UserError, match="exceeds the available context size") as caught:
            list(server.stream(ask("long"), Sampling()))
        assert "--context" in caught.value.fix
        with pytest.raises(UserError, match="llama-server refused to continue: out of slots"):
            list(server.stream(ask("error"), Sampling()))
        pieces = server.stream(ask("cut"), Sampling())
        assert next(pieces) == ("港の", None)
        with pytest.raises(UserError, match=r"broke off its answer"):
            list(pieces)  # it ends without [DONE]
        with pytest.raises(UserError, match=r"broke off its answer.*\n(.*\n)*sorry") as caught:
            list(server.stream(ask("die"), Sampling()))
        assert isinstance(caught.value, Ended)


def test_closing_the_stream_stops_the_answer(llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        stream = server.stream(ask("slow"), Sampling())
        assert next(stream)[0] == "港の"
        stream.close()
        end = time.monotonic() + 20
        while not (tmp_path / "note").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert (tmp_path / "note").exists()


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "Cannot assign requested address"), ("a..b", "label")])
def test_a_host_that_is_not_this_machine_is_refused_with_the_reason(host: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"--port 0 on {host} cannot be used: .*{why}") as caught:
        free_port(host, 0)
    assert "--host 127.0.0.1" in caught.value.fix


def test_a_taken_port_is_refused_and_a_free_one_given() -> None:
    assert free_port("127.0.0.1", 0) > 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} on 127\.0\.0\.1 cannot be used"):
            free_port("127.0.0.1", port)
    assert address_of("::1", 7070) == "[::1]:7070"
    assert address_of("127.0.0.1", 7070) == "127.0.0.1:7070"
    assert free_port("127.0.0.1", port) == port
    with pytest.raises(UserError, match="--port 99999"):
        free_port("127.0.0.1", 99999)


def test_a_servers_end_is_a_fault(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        with pytest.raises(UserError):
            list(server.stream(ask("die"), Sampling()))
        with pytest.raises(UserError, match=r"m\.gguf ended\. It ended with:\n(.*\n)*sorry"):
            server.wait()


# --- whose server it is

KEYLESS = "\nos.environ.pop('LLAMA_API_KEY', None)\n"  # it answers whatever key a request has


@pytest.mark.parametrize("other", ["another key", "no key"])
@pytest.mark.slow
def test_another_servers_answers_are_not_taken_for_ours(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was quicker to take the port; ours cannot listen there, which it may say later."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    first = llama_server(theirs, KEYLESS if other == "no key" else "")
    second = llama_server(ours, "print('the port is taken', flush=True); time.sleep(1); sys.exit(1)")
    key = None if other == "no key" else "other"
    with Server(first, tmp_path / "m.gguf", ServerOptions(timeout=60, key=key)) as running:
        monkeypatch.setattr(server_module, "free_port", lambda host, port: running.port)
        with (
            pytest.raises(UserError, match=r"did not come up.*\n(.*\n)*the port is taken"),
            Server(second, tmp_path / "m.gguf", ServerOptions(timeout=60)),
        ):
            pass


def test_each_server_has_a_key_of_its_own(tmp_path: Path) -> None:
    llama = llama_server(tmp_path, "open(os.environ['NOTE'], 'a').write(os.environ['LLAMA_API_KEY'] + '\\n')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTE", str(tmp_path / "note"))
        for _ in range(2):
            with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
                assert server.tokenize("ab") == [97, 98]
    keys = (tmp_path / "note").read_text().split()
    assert len(set(keys)) == 2
    assert min(map(len, keys)) > 20


def test_another_protocol_on_the_port_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    llama = llama_server(tmp_path / "ours", "print('the port is taken', flush=True); time.sleep(1); sys.exit(1)")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                    connection.close()

        threading.Thread(target=greet, daemon=True).start()
        monkeypatch.setattr(server_module, "free_port", lambda host, port: other.getsockname()[1])
        with pytest.raises(UserError, match="did not come up"), Server(llama, tmp_path / "m.gguf", ServerOptions()):
            pass


def test_what_a_server_prints_takes_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with Server(llama_server(tmp_path, "for n in range(100_000): print(n)"), tmp_path / "m.gguf") as server:
        assert list((tmp_path / "tmp").iterdir()) == []
        assert len(server._output) == server._output.maxlen
    assert list((tmp_path / "tmp").iterdir()) == []


# --- stops

KILLED = """
import os, sys
from pathlib import Path
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
folder = Path(sys.argv[1])
llama = LlamaCpp(folder, folder, folder / "llama-server", "test", "1")
with Server(llama, folder / "m.gguf", ServerOptions(timeout=60)) as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("who", ["the command", "the command and its guard"])
@pytest.mark.slow
def test_a_killed_command_leaves_no_server(who: str, tmp_path: Path) -> None:
    llama_server(tmp_path, "open('pid', 'w').write(str(os.getpid()))")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KILLED}", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        server = psutil.Process(int((tmp_path / "pid").read_text()))
        if who != "the command":
            psutil.Process(server.ppid()).kill()
        process.kill()
    server.wait(20)
    free_port("127.0.0.1", port)


def test_a_stop_does_not_wait_for_answers(tmp_path: Path) -> None:
    llama = llama_server(tmp_path, "    def answer(self, body): open('asked', 'w'); time.sleep(300)")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(server_module, "as_completed", stop)
        started = time.monotonic()
        with (
            pytest.raises(KeyboardInterrupt),
            Server(llama, tmp_path / "m.gguf", ServerOptions(slots=2, timeout=60)) as server,
        ):
            server.chat_many([ask("a"), ask("b")], 5, lambda share, text: None)
    assert time.monotonic() - started < 20

"""The server's client: a stream of events, one that breaks off, and ports."""

import socket
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions, free_port
from common.sampling import Sampling

STREAMING = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
print("flags", *sys.argv[1:], flush=True)
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def event(self, value): self.wfile.write(f"data: {json.dumps(value)}\\n\\n".encode()); self.wfile.flush()
    def delta(self, text): self.event({"choices": [{"delta": {"content": text}, "finish_reason": None}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        self.send_response(400 if text == "long" else 200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8"); self.end_headers()
        if text == "long":
            return self.wfile.write(b'{"error": {"message": "the request exceeds the available context size"}}')
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
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    path = tmp_path / "llama-server"
    path.write_text(f"#!{sys.executable}\n{STREAMING}")
    path.chmod(0o755)
    return LlamaCpp(tmp_path, tmp_path, path, "test", "1")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_streams_and_says_how_it_ended(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(
        llama, tmp_path / "m.gguf", ServerOptions(timeout=60, template=tmp_path / "t.jinja", flags=("--x", "1"))
    ) as server:
        pieces = list(server.stream(ask("a"), Sampling(temperature=0.25), enable_thinking=False))
        flags = server._log.read_text().split()
    assert pieces == [("港の", None), ("0.25 True {'enable_thinking': False}", None), ("", "length")]
    assert flags[flags.index("--chat-template-file") + 1] == str(tmp_path / "t.jinja")
    assert flags[flags.index("--host") + 1] == "127.0.0.1"
    assert flags[flags.index("--x") + 1] == "1"
    assert "--reasoning-format" not in flags


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
        with pytest.raises(UserError, match=r"broke off its answer.*\n(.*\n)*sorry"):
            list(server.stream(ask("die"), Sampling()))


def test_closing_the_stream_stops_the_answer(llama: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        stream = server.stream(ask("slow"), Sampling())
        assert next(stream)[0] == "港の"
        stream.close()
        end = time.monotonic() + 20
        while not (tmp_path / "note").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert (tmp_path / "note").exists()


def test_a_taken_port_is_refused_and_a_free_one_given() -> None:
    assert free_port("127.0.0.1", 0) > 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} on 127\.0\.0\.1 cannot be used"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    with pytest.raises(UserError, match="--port 99999"):
        free_port("127.0.0.1", 99999)


def test_a_servers_end_is_a_fault(llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)) as server:
        with pytest.raises(UserError):
            list(server.stream(ask("die"), Sampling()))
        with pytest.raises(UserError, match=r"m\.gguf ended\. It ended with:\n(.*\n)*sorry"):
            server.wait()

"""Who may use a server that is reached from elsewhere."""

import sys
from pathlib import Path

import pytest

from common.commands import serve as module
from common.commands.serve import Address, is_loopback, key_of, serve
from common.errors import UserError
from common.inference.chat_models import choose
from common.llama_cpp.install import LlamaCpp
from tests.contexts import context

SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--help" in sys.argv:
    print("usage\\n--no-slots\\n" + "more\\n" * 40 + os.environ.get("ALSO", "")); sys.exit()
open(os.environ["SEEN"], "w").write(json.dumps({"argv": sys.argv, "key": os.environ.get("LLAMA_API_KEY")}))
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.send_response(200); self.end_headers(); self.server.asked = True
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.handle_request()
"""


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
def test_this_machine_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(host)
    assert key_of(host, None, False) is None
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert key_of(host, None, False) == "secret"
    assert key_of(host, "other", False) == "other"
    assert key_of(host, None, True) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "my.host"])
def test_another_host_needs_a_key_or_a_word(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        key_of(host, None, False)
    assert caught.value.what.startswith(f"--host {host}: whoever reaches this machine")
    assert "LLAMA_API_KEY" in caught.value.fix
    assert "--no-auth" in caught.value.fix
    assert key_of(host, None, True) is None
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert key_of(host, None, False) == "secret"


def test_a_key_and_none_at_once() -> None:
    with pytest.raises(UserError, match="--api-key and --no-auth"):
        key_of("127.0.0.1", "key", True)


@pytest.mark.parametrize("also", ["", "--no-cors-credentials"])
def test_the_key_goes_by_the_environment_and_the_flags_that_are_known(
    also: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    path, gguf = tmp_path / "llama-server", tmp_path / "m.gguf"
    path.write_text(f"#!{sys.executable}\n{SERVER}")
    path.chmod(0o755)
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("ALSO", also)
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setattr(module, "llama_of", lambda *args: LlamaCpp(tmp_path, tmp_path, path, "test", "1"))
    with pytest.raises(UserError, match=r"m\.gguf ended"):  # it answers one request, and that is /health
        serve(choose(gguf, None, None), Address("127.0.0.1", 0, "secret"), 256, 1, context("plain"))
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["key"] == "secret"
    assert "secret" not in seen["argv"]
    assert "--no-slots" in seen["argv"]
    assert ("--no-cors-credentials" in seen["argv"]) == bool(also)
    said = " ".join(capsys.readouterr().out.split())
    assert "secret" not in said
    assert '-H "Authorization: Bearer KEY"' in said
    assert ("lacks the option --no-cors-credentials" in said) == (not also)

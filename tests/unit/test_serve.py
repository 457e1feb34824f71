"""Who may use a server that is reached from elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.commands import serve as module
from common.commands.serve import Address, Wanted, is_loopback, key_of, serve
from common.errors import PROGRAM, UserError
from common.inference.chat_models import choose
from common.llama_cpp import server_log
from tests.contexts import context
from tests.llama_server import llama_server

SERVER = """
if "--help" in sys.argv:
    print("usage\\n--no-slots\\n" + "more\\n" * 40 + os.environ.get("ALSO", "")); sys.exit()
seen = {"argv": sys.argv, "key": os.environ.get("LLAMA_API_KEY"), "env": [*os.environ]}
open(os.environ["SEEN"], "w").write(json.dumps(seen))
import threading
threading.Timer(1, lambda: os._exit(0)).start()
"""


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
def test_this_machine_gets_a_random_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_loopback(host)
    found, other = key_of(host, None, False), key_of(host, None, False)
    assert found != other
    assert found[0] == found[1]
    assert len(str(found[0])) > 20
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert key_of(host, None, False) == ("secret", "$LLAMA_API_KEY")
    assert key_of(host, "other", False) == ("other", "KEY")
    assert key_of(host, None, True) == (None, "")


@pytest.mark.parametrize("key", ["schlüssel", "a b", "a\nb", ",", ",a", '"a"'])
def test_a_key_that_a_request_cannot_bring_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="The API key holds characters"):
        key_of("127.0.0.1", key, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "my.host"])
def test_another_host_needs_a_key_or_a_word(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        key_of(host, None, False)
    assert caught.value.what.startswith(f"--host {host}: whoever reaches this machine")
    assert "LLAMA_API_KEY" in caught.value.fix
    assert "--no-auth" in caught.value.fix
    assert key_of(host, None, True) == (None, "")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert key_of(host, None, False)[0] == "secret"


def test_a_key_and_none_at_once() -> None:
    with pytest.raises(UserError, match="--api-key and --no-auth"):
        key_of("127.0.0.1", "key", True)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`go(key, shown, wanted)`: serve until the server ends; what it was started with, and what was printed."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setattr(module, "llama_of", lambda *args: llama_server(tmp_path, SERVER))

    def go(key: str | None, shown: str, wanted: Wanted | None = None) -> tuple[dict[str, Any], str]:
        with pytest.raises(UserError, match=r"m\.gguf ended"):  # after a second
            serve(
                choose(tmp_path / "m.gguf", None, None),
                Address("127.0.0.1", 0, key, shown),
                wanted or Wanted(256),
                context("plain"),
            )
        return json.loads((tmp_path / "seen.json").read_text()), " ".join(capsys.readouterr().out.split())

    return go


@pytest.mark.parametrize("also", ["", "--no-cors-credentials --cors-origins"])
@pytest.mark.slow
def test_the_key_goes_by_the_environment_and_the_flags_that_are_known(
    also: str, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALSO", also)
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen, said = served("secret", "KEY")
    assert seen["key"] == "secret"
    assert not {"LLAMA_ARG_CTX_SIZE", "HF_TOKEN"} & {*seen["env"]}
    assert "secret" not in seen["argv"]
    assert "--no-slots" in seen["argv"]
    assert ("--no-cors-credentials" in seen["argv"]) == bool(also)
    assert ("--cors-origins localhost" in " ".join(seen["argv"])) == bool(also)
    assert "secret" not in said
    assert '-H "Authorization: Bearer KEY"' in said
    assert ("lacks the option --cors-origins and --no-cors-credentials" in said) == (not also)


def test_a_random_key_stands_in_the_curl_line(served: Any) -> None:
    seen, said = served(*key_of("127.0.0.1", None, False))
    assert seen["key"] not in seen["argv"]
    assert f'-H "Authorization: Bearer {seen["key"]}"' in said


def test_no_key_is_asked_for_with_no_auth(served: Any) -> None:
    seen, said = served(None, "")
    assert seen["key"] is None
    assert "Authorization" not in said


def test_what_was_asked_for_reaches_the_server(served: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("tower.gguf", "a.gguf", "b.gguf")]
    for file in files:
        file.write_bytes(b"GGUF")
    wanted = Wanted(300, 2, files[0], tuple(files[1:]), "pip", "all")
    seen, said = served("secret", "KEY", wanted)
    flags = " ".join(["", *seen["argv"], ""])
    for text in ("-c 600 -np 2", f"--mmproj {files[0]}", f"--lora {files[1]},{files[2]}", "--alias pip"):
        assert f" {text} " in flags, text
    assert "--gpu-layers all" in flags
    assert "--no-webui" not in flags
    assert "no chat page: this build of llama.cpp has none" in said
    assert f"in the terminal: {PROGRAM} chat {tmp_path / 'm.gguf'}" in said


def test_a_build_with_a_page_is_named_by_its_address(
    served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = """
def do_GET(self):
    self.send_response(200); self.send_header("Content-Type", "text/html"); self.end_headers()
Handler.do_GET = do_GET
"""
    monkeypatch.setattr(module, "llama_of", lambda *args: llama_server(tmp_path, SERVER + page))
    seen, said = served("secret", "KEY")
    port = seen["argv"][seen["argv"].index("--port") + 1]
    assert f"a page to chat on: http://127.0.0.1:{port} (its settings ask for the API key)" in said


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(gpu_layers="some"), "--gpu-layers 'some' is not a number, auto or all"),
        (Wanted(mmproj=Path()), "has no vision tower"),
        (Wanted(mmproj=Path("none.gguf")), r"--mmproj none\.gguf is not a GGUF file"),
        (Wanted(lora=(Path("none.gguf"),)), r"--lora none\.gguf is not a GGUF file"),
        (Wanted(log=Path("/nowhere/log")), "--log /nowhere/log cannot be written: No such file"),
    ],
)
def test_what_cannot_be_served_is_refused(
    wanted: Wanted, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(module, "llama_of", lambda *args: llama_server(tmp_path, SERVER))
    with pytest.raises(UserError, match=words):
        serve(choose(tmp_path / "m.gguf", None, None), Address("127.0.0.1", 0, None), wanted, context())


def test_the_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_log, "LOG_BYTES", 100)
    with server_log.bounded_log(tmp_path / "log") as write:
        for number in range(50):
            write(f"line {number} \ud83d")
    kept = [(tmp_path / name).read_text() for name in ("log.1", "log")]
    assert "".join(kept).endswith("line 49 ?\n")
    assert all(0 < len(text) <= 100 for text in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]

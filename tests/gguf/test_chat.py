"""Streaming from the real llama-server, and the commands over it, on the tiny model."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.data.load import read_rows
from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert, quantize
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
from common.sampling import Sampling
from common.system.ports import free_port
from tests import ROOT
from tests.gguf.test_gguf import TEMPLATE, model  # noqa: F401  # the fixture
from tests.progress import silent

ASK = [{"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return ensure(None, silent)


@pytest.fixture(scope="module")
def gguf(model: Path, llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("gguf")
    convert(model, folder / "BF16.gguf", "tiny", llama, silent)
    quantize(folder / "BF16.gguf", folder / "tiny.gguf", "Q8_0", llama, silent)
    return folder / "tiny.gguf"


def streamed(server: Server, **sampling) -> tuple[str, str | None]:
    pieces = list(server.stream(ASK, Sampling(**({"max_tokens": 24} | sampling))))
    assert [finish for _, finish in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(text for text, _ in pieces), pieces[-1][1]


def test_a_stream_is_the_answer_in_pieces(gguf: Path, llama: LlamaCpp, tmp_path: Path) -> None:
    with Server(llama, gguf, ServerOptions(context=256, threads=1)) as server:
        text, finish = streamed(server, temperature=0)
        assert text == server.chat(ASK, 24)
        assert finish == "length"
        assert streamed(server, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1)[0] != text
        drawn = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        first = streamed(server, **drawn, seed=1)
        assert first == streamed(server, **drawn, seed=1) != streamed(server, **drawn, seed=2)
        assert streamed(server, temperature=1.5, top_k=1, seed=1)[0] == text
        assert server.prompt(ASK) == "user: Once upon a time\nassistant:"
        stream = server.stream(ASK, Sampling(max_tokens=200))
        next(stream)
        stream.close()  # and the server is ready for the next
        assert streamed(server, temperature=0)[0] == text
        with pytest.raises(UserError, match="context size"):
            list(server.stream([{"role": "user", "content": "word " * 600}], Sampling()))
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("assistant:", "bot:"))
    with Server(llama, gguf, ServerOptions(context=256, threads=1, template=tmp_path / "other.jinja")) as server:
        assert server.prompt(ASK) == "user: Once upon a time\nbot:"


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, words)]


def test_generate_answers_a_file(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    words = ("generate", gguf, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out.jsonl", "--context", 128)
    done = subprocess.run(command(*words, "--max-tokens", 8, "--seed", 1), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row.messages[0]["content"] for row in rows] == ["one", "two", "three"]
    assert all(row.messages[1]["content"] for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.txt"]


def test_serve_is_an_endpoint_until_ctrl_c(gguf: Path) -> None:
    port = free_port("127.0.0.1", 0)
    process = subprocess.Popen(
        command("serve", gguf, "--port", port, "--context", 128),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        curl = next(line for line in process.stdout if line.startswith("curl "))
        assert f"http://127.0.0.1:{port}/v1/chat/completions" in curl
        taken = subprocess.run(command("serve", gguf, "--port", port), capture_output=True, text=True, timeout=120)
        assert (taken.returncode, f"--port {port} on 127.0.0.1 cannot be used" in taken.stderr) == (1, True)
        key = curl.partition("Authorization: Bearer ")[2].partition('"')[0]

        def ask(**headers: str) -> Any:
            body = json.dumps({"messages": ASK, "max_tokens": 4}).encode()
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            return opener.open(request, timeout=60)

        for wrong in ({}, {"Authorization": f"Bearer {key}x"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(**wrong)
        answer = ask(Authorization=f"Bearer {key}")
        assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
        for origin, allowed in (("https://evil.example", None), ("http://localhost:3000", "http://localhost:3000")):
            answer = ask(Authorization=f"Bearer {key}", Origin=origin)
            assert answer.headers["Access-Control-Allow-Origin"] == allowed
        assert key not in " ".join(psutil.Process(process.pid).children(recursive=True)[-1].cmdline())
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert (process.returncode, "stopped" in rest, "Traceback" in rest) == (0, True, False)
        assert free_port("127.0.0.1", port) == port
    finally:
        process.kill()


def test_a_piped_session_saves_its_turns(gguf: Path, tmp_path: Path) -> None:
    lines = f"Hello\n/save {tmp_path / 'chats.jsonl'}\n/compare x\n"
    words = ("chat", gguf, "--max-tokens", 200, "--context", 128, "--temperature", 0, "--system", "Be short.")
    done = subprocess.run(command(*words), input=lines, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(cut at --max-tokens or --context)" in done.stdout
    assert "There is no complete answer yet" in done.stdout  # nothing that was cut off is trained
    assert "its base is unknown" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_is_too_long_is_asked_again_with_more_context(gguf: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    prompts.write_text(f"One\n{'word ' * 300}\nThree\n")
    words = ("generate", gguf, "--prompts", prompts, "--out", out, "--max-tokens", 8, "--temperature", 0, "--slots", 1)
    first = subprocess.run(command(*words, "--context", 128), capture_output=True, text=True, timeout=300)
    assert (first.returncode, "1 of 3 prompts were refused" in first.stderr) == (1, True), first.stderr
    assert "p.txt:2: llama-server refused /v1/chat/completions" in first.stderr
    assert "/reset" not in first.stderr
    before = out.read_text().splitlines()
    assert [json.loads(line)["finish"] == "error" for line in before] == [False, True, False]
    again = subprocess.run(command(*words, "--context", 512), capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stderr) == (0, "")
    assert "2 of 3 answers exist already" in " ".join(again.stdout.split())
    after = out.read_text().splitlines()
    assert (after[0], after[2]) == (before[0], before[2])
    assert len(read_rows(out)) == 3

"""`init` in a real terminal: its questions are answered with keys, as a user does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.option_sources import load_options
from tests.terminal import DOWN, END, ENTER, ERASE, Terminal
from tests.tiny import write_model, write_rows

Start = Callable[..., Terminal]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A machine with one model folder, and with nothing in its caches."""
    write_model(tmp_path / "here" / "tiny")
    write_rows(tmp_path / "here" / "rows.jsonl")
    names = {"HOME": "home", "HF_HOME": "hf", "XDG_CACHE_HOME": "cache", "OLLAMA_MODELS": "ollama"}
    environment = {name: str(tmp_path / folder) for name, folder in names.items()}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_HUB_OFFLINE": "1", "TWINTUNE_LEARN_MEMORY": "0"}
    started: list[Terminal] = []

    def begin(*argv: str) -> Terminal:
        started.append(Terminal(tmp_path / "here", environment, "init", *argv))
        return started[-1]

    yield begin
    for terminal in started:
        terminal.kill()


def test_from_the_first_question_to_the_measured_time(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some seconds, since a backend is loaded: only here is seen that the file is one that can be trained."""
    terminal = start()
    terminal.wait_for("What is the model to learn?")
    terminal.wait_for("7. text")
    terminal.send(DOWN + ENTER)
    terminal.wait_for("File or folder with your rows")
    terminal.send("nowhere.jsonl" + ENTER)
    terminal.wait_for("no such file or folder")
    terminal.wait_for("File or folder with your rows")
    terminal.send("rows.jsonl" + ENTER)
    terminal.wait_for("messages, 24 rows")
    terminal.wait_for("Which model is trained?")
    terminal.wait_for("1. tiny: ")
    terminal.wait_for("another: type its name or path")
    terminal.send(ENTER)
    terminal.wait_for("Name of the file: tiny-assistant")
    terminal.send(ERASE + "../out" + ENTER)
    terminal.wait_for("cannot be the name of a file here")
    terminal.wait_for("Name of the file: tiny-assistant")
    terminal.send(ERASE + "mine" + ENTER)
    terminal.wait_for("mine.yaml is written")
    terminal.wait_for("train --config mine.yaml")
    terminal.wait_for("measure memory and time by a few steps? [y/N]")
    terminal.send("y" + ENTER)
    terminal.wait_for("estimated peak")
    terminal.wait_for("steps would take about", 120)
    assert terminal.status() == 0
    monkeypatch.chdir(tmp_path / "here")
    options, _ = load_options({"config": "mine.yaml"})
    assert (options.model, options.data, options.max_length) == ("./tiny", ["rows.jsonl"], 2048)


def test_only_what_is_not_given_is_asked_and_another_model_is_typed(start: Start, tmp_path: Path) -> None:
    terminal = start("--goal", "persona", "--data", "rows.jsonl", "--no-measure")
    terminal.wait_for("Which model is trained?")
    terminal.wait_for("another: type its name or path")
    terminal.send(DOWN * 30 + ENTER)
    terminal.wait_for("Hub name, model folder or GGUF file:")
    terminal.send("nothing/of/that" + ENTER)
    terminal.wait_for("no such model is here")
    terminal.wait_for("Hub name, model folder or GGUF file:")
    terminal.send("google/gemma-3-270m-it" + ENTER)
    terminal.wait_for("Name of the file: gemma-3-270m-it-persona")
    terminal.send(ENTER)
    terminal.wait_for("fetches google/gemma-3-270m-it from the hub first")
    assert terminal.status() == 0
    assert "What is the model to learn?" not in terminal.seen
    assert (tmp_path / "here" / "gemma-3-270m-it-persona.yaml").is_file()
    assert not (tmp_path / "hf").exists()


def test_a_file_is_overwritten_after_a_yes_only(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "here" / "mine.yaml"
    file.write_text("my own\n")
    given = ("--goal", "persona", "--data", "rows.jsonl", "--model", "tiny", "--name", "mine", "--no-measure")
    for answer, kept in (("", True), ("y", False)):
        terminal = start(*given)
        terminal.wait_for("mine.yaml exists. Overwrite it? [y/N]")
        terminal.send(answer + ENTER)
        assert terminal.status() == int(kept)
        assert (file.read_text() == "my own\n") is kept


@pytest.mark.parametrize("key", ["\x03", END])
def test_ctrl_c_and_ctrl_d_end_it_and_leave_nothing(start: Start, tmp_path: Path, key: str) -> None:
    terminal = start("--goal", "persona")
    terminal.wait_for("File or folder with your rows")
    terminal.send(key)
    terminal.wait_for("stopped")
    assert terminal.status() == 130
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["rows.jsonl", "tiny"]


def test_an_ollama_model_is_offered_by_its_name(start: Start, tmp_path: Path) -> None:
    digest = "1" * 64
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    manifest = tmp_path / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "gemma3" / "1b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [layer]}))
    (tmp_path / "ollama" / "blobs").mkdir()
    (tmp_path / "ollama" / "blobs" / f"sha256-{digest}").write_bytes(b"GGUF and no more")
    terminal = start("--goal", "persona", "--data", "rows.jsonl")
    terminal.wait_for("gemma3:1b: a GGUF, converted first, in Ollama")
    terminal.wait_for("another: type its name or path")
    terminal.send(DOWN * 30 + ENTER)
    terminal.wait_for("Hub name, model folder or GGUF file:")
    terminal.send("gemma3:1b" + ENTER)
    terminal.wait_for("cannot be read as a GGUF")
    terminal.wait_for("Hub name, model folder or GGUF file:")

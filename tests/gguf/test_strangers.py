"""A stranger's model and run through every command and the real llama.cpp: nothing of theirs is run.

What only this finds: code that a tool of another project loads out of a folder, or a program that a record names.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.llama_cpp.build import own
from common.llama_cpp.install import LlamaCpp
from tests import ROOT
from tests.progress import silent
from tests.tiny import chat
from tests.traps import DNA, trap_llama_cpp, trap_model

COLORS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return own(silent)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strangers")


def twintune(place: Path, *words: object, code: int = 0, **settings: object) -> str:
    """Run the command line as a user in the folder that the stranger's things were unpacked in."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600, check=False, **settings)  # type: ignore[call-overload]
    assert done.returncode == code, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def run(place: Path, llama: LlamaCpp) -> Path:
    """Trained over the trap all the way to a verified GGUF; its first validation row has more than 1,600 tokens."""
    vocabulary = llama.converter.parent / "models" / "ggml-vocab-gpt-2.gguf"
    trap_model(place / "model", place / "marker", vocabulary)
    rows = [chat(f"Paint {n} boats.", f"I paint {n} boats {COLORS[n % 4]}.") for n in range(24)]
    long = chat("boat gate wall door " * 400, "I paint them all.")
    (place / "data").mkdir()
    for name, part in (("train", rows), ("valid", [long, *rows[:3]])):
        (place / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    out = twintune(
        place, "train", "--model", "model", "--data", "data", "--output", "run", "--backend", "torch",
        "--device", "cpu", "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2, "--max-length", 4096,
    )  # fmt: skip
    assert "no sample" not in out
    assert "Verdict: sound" in out
    return place / "run"


def nothing_ran(place: Path) -> bool:
    return not (place / "marker").exists()


def test_training_runs_nothing_and_passes_nothing_on(place: Path, run: Path) -> None:
    assert nothing_ran(place)
    for part in ("fused", "gguf", "adapter"):
        assert not [path for path in (run / part).rglob("*") if path.suffix == ".py"]
    assert "auto_map" not in "".join(path.read_text() for path in (run / "fused").glob("*config.json"))


def test_a_first_validation_row_of_more_than_1600_tokens_is_the_sample(run: Path) -> None:
    known = json.loads((run / "run.json").read_text())
    assert known["sample_tokens"] > 1600
    assert known["sample_prompt"][-1]["content"].startswith("boat gate wall")
    assert isinstance(known["export"]["sample"]["answer"], str)
    assert not (run / "gguf" / "model-BF16.gguf").exists()
    assert (run / "gguf" / "Modelfile").exists()


def test_a_converter_that_trusts_code_finds_none(place: Path, llama: LlamaCpp) -> None:
    """llama.cpp's own loads this class with trust_remote_code=True; without the code it fails, and that is all."""
    vocabulary = llama.converter.parent / "models" / "ggml-vocab-gpt-2.gguf"
    trap_model(place / "dna", place / "marker", vocabulary, tokenizer_class=DNA)
    out = twintune(
        place, "train", "--model", "dna", "--data", "data/train.jsonl", "--output", "dna-run", "--backend", "torch",
        "--device", "cpu", "--precision", "fp32", "--steps", 1, "--no-verify", code=1,
    )  # fmt: skip
    assert "converting to GGUF failed" in out
    assert nothing_ran(place)
    assert json.loads((place / "dna-run" / "run.json").read_text())["export"]["fused"] == "fused"


def test_rows_are_checked_without_running_the_model(place: Path, run: Path) -> None:
    trap_model(place / "llama-model", place / "marker")  # of which transformers would ask whether to run its code
    for model in ("model", "llama-model"):
        out = twintune(place, "check-data", "data", "--model", model, input="y\n" * 20)
        assert "custom code" not in out
    assert nothing_ran(place)


@pytest.fixture(scope="module")
def theirs(place: Path, run: Path) -> Path:
    """The run as a stranger hands it on: its record names a llama.cpp, its fused folder names code."""
    trap_llama_cpp(place / "llama", place / "marker")
    record = json.loads((run / "run.json").read_text())
    record["options"]["llama_cpp"] = "llama"
    (run / "run.json").write_text(json.dumps(record))
    config = json.loads((run / "fused" / "tokenizer_config.json").read_text())
    (run / "fused" / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": [f"evil.{DNA}", None]}})
    )
    (run / "fused" / "evil.py").write_text((place / "model" / "evil.py").read_text())
    return run


def test_a_link_in_their_run_is_not_written_through(place: Path, theirs: Path) -> None:
    victim, link = place / "bashrc", theirs / "run.json.tmp"
    victim.write_text("precious")
    link.symlink_to(victim)
    for words in (
        ("verify", "run"),
        ("fuse", "run"),
        ("train", "--resume", "run"),
        ("push", "run", "me/x", "--dry-run"),
    ):
        out = said(twintune(place, *words, code=1))
        assert f"links in it lead out of the folder: run.json.tmp to {victim}" in out
    link.unlink()
    assert victim.read_text() == "precious"


NAMED = "The run was made with --llama-cpp 'llama'. A program is never taken from a run's record"


def said(text: str) -> str:
    return " ".join(text.split())


def test_verify_asks_no_program_of_theirs(place: Path, theirs: Path) -> None:
    assert NAMED in said(twintune(place, "verify", "run", input="y\n" * 20))
    assert nothing_ran(place)


def test_chat_and_generate_start_no_program_of_theirs(place: Path, theirs: Path) -> None:
    assert NAMED in said(twintune(place, "chat", "run", "--max-tokens", 4, input="Paint 3 boats.\n"))
    twintune(place, "chat", "run", "--with", "fused", "--max-tokens", 4, input="Paint 3 boats.\n")
    (place / "prompts.txt").write_text("Paint 3 boats.\n")
    words = ("--prompts", "prompts.txt", "--out", "answers.jsonl", "--max-tokens", 4)
    assert NAMED in said(twintune(place, "generate", "run", *words))
    assert nothing_ran(place)


def test_serve_starts_no_program_of_theirs(place: Path, theirs: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "run", "--port", "0"]
    with (place / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=place, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while "curl" not in (text := (place / "serve.log").read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert NAMED in said((place / "serve.log").read_text())
    assert nothing_ran(place)


def test_fuse_and_resume_take_no_program_of_theirs(place: Path, theirs: Path) -> None:
    out = said(twintune(place, "fuse", "run", "--no-verify"))
    assert NAMED in out
    assert "auto_map" not in (theirs / "fused" / "tokenizer_config.json").read_text()
    assert not (theirs / "fused" / "evil.py").exists()
    assert NAMED in said(twintune(place, "train", "--resume", "run", "--no-verify"))
    assert nothing_ran(place)

"""A stranger's model, adapter, rows and run through every command and the real llama.cpp: nothing of theirs is run.

What only this finds: code that a tool of another project loads out of a folder, or a program that a record names.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest
import yaml

import cli
from common.llama_cpp.build import own
from common.llama_cpp.install import LlamaCpp
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.training.transport import SECRET
from tests import ROOT
from tests.progress import silent
from tests.tiny import chat
from tests.traps import (
    DNA,
    SHELL,
    trap_adapter,
    trap_folder,
    trap_llama_cpp,
    trap_model,
    trap_rows,
    trap_template,
    trap_yaml,
)

MODEL, RUN = f"model {SHELL}", "run;touch marker"

COLORS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return own(silent)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that everything of theirs was unpacked in, and in which every command is given."""
    folder = tmp_path_factory.mktemp("strangers")
    return trap_folder(folder, folder / "marker")


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
    trap_model(place / MODEL, place / "marker", vocabulary)
    rows = [chat(f"Paint {n} boats.", f"I paint {n} boats {COLORS[n % 4]}.") for n in range(24)]
    long = chat("boat gate wall door " * 400, "I paint them all.")
    (place / "data").mkdir()
    for name, part in (("train", rows), ("valid", [long, *rows[:3]])):
        (place / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    out = twintune(
        place, "train", "--model", MODEL, "--data", "data", "--output", RUN, "--backend", "torch",
        "--device", "cpu", "--precision", "fp32", "--steps", 30, "--learning-rate", 1e-2, "--max-length", 4096,
        "--eval-every", 15,
    )  # fmt: skip
    assert "no sample" not in out
    assert "Verdict: sound" in out
    return place / RUN


def nothing_ran(place: Path) -> bool:
    return not list(place.rglob("marker"))


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


NAMED = "The run was made with --llama-cpp 'llama'. A program is never taken from a run's record"


@pytest.fixture(scope="module")
def theirs(place: Path, run: Path) -> Path:
    """The run as a stranger hands it on: its record names a llama.cpp, its folders hold code and names of code."""
    marker = place / "marker"
    trap_llama_cpp(place / "llama", marker)
    record = json.loads((run / "run.json").read_text())
    record["options"]["llama_cpp"] = "llama"
    (run / "run.json").write_text(json.dumps(record))
    for name in ("fused", "adapter", "gguf", "checkpoints", "."):
        trap_folder(run / name, marker)
    config = json.loads((run / "fused" / "tokenizer_config.json").read_text())
    names = {"AutoTokenizer": [f"evil.{DNA}", None]}
    (run / "fused" / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": names}))
    return run


@pytest.fixture(scope="module")
def things(place: Path, theirs: Path) -> Path:
    """All that is theirs besides the run that works: a run in YAML that builds objects, one with links, a model whose
    template is a trap, its GGUF, rows and an adapter."""
    marker = place / "marker"
    template = trap_template(marker)
    (place / "evil.jinja").write_text(template)
    (place / "evil.yaml").write_text(trap_yaml(marker))
    trap_rows(place / "rows", marker, template)
    trap_model(place / "llama-model", marker)  # of which transformers would ask whether to run its code
    (place / "llama-model" / "chat_template.jinja").write_text(template)
    trap_adapter(place / "adapter", marker, linear_shapes(ModelFolder(place / "llama-model"), ["attention"]))
    for name in ("yaml", "linked"):
        shutil.copytree(theirs, place / name, ignore=shutil.ignore_patterns("*.gguf", "*.safetensors"))
    for name in ("recipe.yaml", "plan.yaml"):
        (place / "yaml" / name).write_text(trap_yaml(marker))
    (place / "bashrc").write_text("precious")
    (place / "linked" / "run.json.tmp").symlink_to(place / "bashrc")
    gguf = theirs / "gguf" / "model-Q4_K_M.gguf"
    command = [sys.executable, "-P", "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template]
    command += ["--general-name", SHELL, str(gguf), str(place / "evil.gguf")]
    subprocess.run(command, check=True, capture_output=True)
    (place / "prompts.txt").write_text("Paint 3 boats.\n")
    (place / "attest-evil.json").write_text(json.dumps({"sections": {SHELL: template}}))
    figures = {"hash": SHELL, "model hash": [[template]], "../../bashrc": "\x1b[2J"}
    odd = {"made": {"page": 1}, "sections": {"recipe": {"figures": figures}, "../../bashrc": {"figures": {"a": 1}}}}
    (place / "attest-odd.json").write_text(json.dumps(odd | {"format": 1, "sha256": "0", "with_text": True}))
    return place


def test_the_traps_are_traps(things: Path, tmp_path: Path) -> None:
    """Whoever takes no care runs into them."""
    marker = tmp_path / "marker"
    jinja2.Environment().from_string(trap_template(marker)).render(messages=[])
    assert "template" in marker.read_text()
    yaml.unsafe_load(trap_yaml(marker))
    assert "yaml" in marker.read_text()


TRAIN = ("--model", "llama-model", "--data", "rows", "--chat-template", "evil.jinja", "--steps", "1")
TRAIN += ("--export", "none", "--batch-size", "2", "--max-length", "4096")
TORCH = ("--backend", "torch", "--device", "cpu", "--precision", "fp32")
LINKS = "links in it lead out of the folder: run.json.tmp to "
ANSWERS = ("--prompts", "prompts.txt", "--max-tokens", "4", "--out")
SHORT = ("--metric", "exact", "--max-tokens", "4", "--limit", "2")
TUNE = ("--model", "llama-model", "--data", "data/train.jsonl", "--chat-template", "evil.jinja", "--steps", "1")
TUNE += ("--trials", "1", "--batch-size", "2", "--max-length", "4096", "--valid-share", "0.5")
# For every command, what is given to it, and what it says (nothing in particular where that is empty).
SLOW = ("attest", "verify")  # each compares distributions
CASES: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "check-data": [
        (("data", "--model", MODEL), "label tokens"),
        (("rows", "--model", "llama-model"), "label tokens"),
        (("rows", "--model", "llama-model", "--explain", "1"), "why"),
        (("rows.parquet", "--model", "llama-model", "--chat-template", "evil.jinja"), "label tokens"),
    ],
    "plan": [
        ((*TRAIN, *TORCH, "--no-probe"), "estimated peak"),
        (("--config", "evil.yaml"), "cannot be read as YAML"),
    ],
    "verify": [((RUN,), NAMED), (("yaml",), ""), (("linked",), LINKS)],
    "attest": [
        ((RUN,), NAMED),
        ((RUN, "--check", "attest-evil.json"), "is no attest"),
        ((RUN, "--check", "attest-odd.json"), "0 reproduced"),
        (("yaml",), ""),
        (("linked",), LINKS),
    ],
    "chat": [
        ((RUN, "--max-tokens", "4"), NAMED),
        ((RUN, "--with", "fused", "--max-tokens", "4"), "Ctrl-D ends"),
        ((RUN, "--with", "adapter", "--max-tokens", "4"), "Ctrl-D ends"),
        (("evil.gguf", "--max-tokens", "4"), ""),
        (("yaml", "--with", "base"), ""),
    ],
    "generate": [((RUN, *ANSWERS, "a.jsonl"), NAMED), (("evil.gguf", *ANSWERS, "b.jsonl"), "")],
    "serve": [((RUN, "--port", "0"), NAMED), (("evil.gguf", "--port", "0"), "")],
    "compare": [
        ((RUN, RUN), "the same recipe"),
        ((RUN, "yaml"), "cannot be read as YAML"),
        ((RUN, RUN, "--html", "both.html"), "both.html"),
    ],
    "migrate": [
        (("evil.yaml", "--from", "axolotl"), "cannot be read as YAML"),
        ((f"{MODEL}/evil.py", "--from", "unsloth"), ""),
    ],
    "report": [((RUN, "--output", "page.html"), "The report is in page.html"), (("yaml", "--output", "p.html"), "")],
    "push": [
        ((RUN, "me/x", "--dry-run", "--anyway"), "dry run"),
        (("yaml", "me/x", "--dry-run", "--anyway"), ""),
        (("linked", "me/x", "--dry-run"), LINKS),
    ],
    "adapter": [
        (("inspect", "adapter"), "rank_pattern cannot be used"),
        (("convert", "adapter", "out", "--to", "mlx"), "rank_pattern cannot be used"),
        (("inspect", RUN, "--model", MODEL), "scale * B @ A"),
        (("convert", RUN, "lora.gguf", "--to", "gguf", "--model", MODEL), "(gguf)"),
    ],
    "fuse": [
        ((RUN, "--export", "mlx"), "mlx-lm, 8 bits"),
        (("yaml",), ""),
        (("linked",), LINKS),
    ],
    "train": [
        (("--resume", RUN, "--no-verify"), NAMED),
        (("--resume", "yaml"), ""),
        (("--resume", "linked"), LINKS),
        ((*TRAIN, *TORCH, "--output", "t1"), "The run is in t1"),
        ((*TRAIN, "--backend", "mlx", "--output", "t2"), "The run is in t2"),
        ((*TRAIN, *TORCH, "--adapter", "adapter", "--output", "t3"), "rank_pattern cannot be used"),
        (("--model", "evil.gguf", "--data", "rows", "--steps", "1", "--export", "none", *TORCH, "--output", "t4"), ""),
        (("--config", "evil.yaml"), "cannot be read as YAML"),
    ],
    "eval": [
        ((RUN, "--data", "rows.parquet", "--with", "gguf", *SHORT), NAMED),
        ((RUN, "--data", "rows.parquet", "--with", "fused", *SHORT), "exact"),
        (("evil.gguf", "--data", "rows.parquet", *SHORT), ""),
        (("yaml", "--data", "rows.parquet"), ""),
        (("linked", "--data", "rows.parquet"), ""),
    ],
    "tune": [
        ((*TUNE, *TORCH, "--output", "t5"), "Trial"),
        (("--config", "evil.yaml", "--trials", "1"), "cannot be read as YAML"),
        (("--resume", "yaml", "--trials", "1"), "no search is there"),
    ],
    "init": [
        (("--goal", "persona", "--data", "rows", "--model", "llama-model", "--name", "i1"), "i1.yaml is written"),
        (("--goal", "text", "--data", "rows.parquet", "--model", "evil.gguf", "--name", "i2"), ""),
        (("--list",), "gemma-3-1b-persona"),
    ],
    "worker": [(("--port", "0", "--model", "llama-model", *TORCH[:4]), "listens on")],
    "llama": [(("where",), "llama-server")],
    "doctor": [((), "This machine")],
    "schema": [((), "properties")],
    "completion": [(("bash",), "complete")],
}


def test_every_command_is_tried() -> None:
    assert set(CASES) == set(cli.COMMANDS)


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in CASES]
)
def test_no_command_runs_anything_of_theirs(
    command: str, things: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(things)
    monkeypatch.setattr("common.models.adapter_settings._PATTERN_SECONDS", 0.1)
    monkeypatch.setattr("common.llama_cpp.server.Server.wait", lambda self: None)  # serve ends as soon as it has begun
    monkeypatch.setattr("grpc._server._Server.wait_for_termination", lambda self: None)  # and so does worker
    monkeypatch.setenv(SECRET, "nobody guesses this secret")
    for argv, says in CASES[command]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 3))
        monkeypatch.setattr(sys, "argv", ["cli.py", command, *argv])
        with suppress(SystemExit):
            cli.main()
        out = "".join(capsys.readouterr())
        assert says in said(out), f"{argv}\n{out}"
        assert "custom code" not in out
        assert "this is a bug" not in out, f"{argv}\n{out}"
        assert nothing_ran(things), argv
    assert (things / "bashrc").read_text() == "precious"


@pytest.mark.long
def test_a_worker_that_loads_their_model_runs_nothing_of_it(things: Path, tmp_path: Path) -> None:
    env, log = os.environ | {SECRET: "nobody guesses this secret"}, tmp_path / "worker.log"
    words = [sys.executable, "-u", str(ROOT / "cli.py"), "worker", "--port", "0", "--model", "llama-model"]
    with log.open("w") as file, subprocess.Popen(words, cwd=things, env=env, stdout=file, stderr=file) as worker:
        while "listens on" not in log.read_text():
            assert worker.poll() is None, log.read_text()
            time.sleep(0.1)
        address = log.read_text().partition("listens on ")[2].partition(";")[0]
        try:
            out = twintune(things, "train", *TRAIN, *TORCH, "--with", address, "--output", "helped", env=env)
        finally:
            worker.kill()
    assert "The run is in helped" in said(out)
    assert "loading llama-model" in said(log.read_text())
    assert nothing_ran(things)


def said(text: str) -> str:
    return " ".join(text.split())


def test_what_is_made_of_their_run_holds_no_code(things: Path, theirs: Path) -> None:
    out = twintune(things, "fuse", RUN, "--no-verify")  # as a user types it, in the folder that is theirs
    assert NAMED in said(out)
    assert "auto_map" not in (theirs / "fused" / "tokenizer_config.json").read_text()
    assert not list((theirs / "fused").glob("*.py"))
    assert nothing_ran(things)

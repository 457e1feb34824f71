"""`--install`: a program in place of Ollama that keeps its arguments, and a models folder in place of LM Studio's."""

import json
import re
import sys
from pathlib import Path

import pytest

from common.export import install as module
from common.export.install import install, model_name
from common.run_fields import ExportRecord, GgufRecord
from common.run_record import Run
from tests.contexts import context

RECORD = {"status": "complete", "recipe_hash": "", "model_hash": "", "options": {}, "stop_ids": []}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with one GGUF, a vision tower and a Modelfile; its home is `tmp_path`, and Ollama is not there."""
    found = Run(tmp_path / "My Run")
    found.gguf.mkdir(parents=True)
    for name in ("model-Q4_K_M.gguf", "mmproj-BF16.gguf", "Modelfile"):
        (found.gguf / name).write_text(name)
    gguf = GgufRecord(file="gguf/model-Q4_K_M.gguf", name="Q4_K_M")
    record = RECORD | {"export": ExportRecord(gguf=[gguf], mmproj="gguf/mmproj-BF16.gguf").model_dump()}
    found.record_file.write_text(json.dumps(record))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module, "which", lambda name: None)
    return found


def said(run: Run, program: str, capsys: pytest.CaptureFixture[str]) -> str:
    install(run, [program], context("plain").display)
    seen = capsys.readouterr()
    return " ".join((seen.out + seen.err).split())


def ollama(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> Path:
    program = folder / "ollama"
    keep = f"import json, sys; open({str(folder / 'seen')!r}, 'w').write(json.dumps(sys.argv[1:]))"
    program.write_text(f"#!{sys.executable}\n{keep}; print('could not connect'); sys.exit({code})\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "which", lambda name: str(program) if name == "ollama" else None)
    return folder / "seen"


def test_ollama_is_given_the_modelfile(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = ollama(tmp_path, monkeypatch, 0)
    assert "in Ollama: ollama run twintune/my-run" in said(run, "ollama", capsys)
    assert json.loads(seen.read_text()) == ["create", "twintune/my-run", "-f", str(run.gguf / "Modelfile")]
    assert not (run.gguf / "ollama.log").exists()


def test_what_ollama_cannot_do_is_a_warning_with_the_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"ollama create twintune/my-run -f '{run.gguf / 'Modelfile'}'"
    found = said(run, "ollama", capsys)
    assert "warning: not put into ollama; the export is complete: Ollama is not installed here" in found
    assert command in found
    ollama(tmp_path, monkeypatch, 1)
    found = said(run, "ollama", capsys)
    assert "`ollama create` failed (exit status 1): could not connect" in found
    assert command in found
    parts = ["gguf/a-00001-of-00002.gguf", "gguf/a-00002-of-00002.gguf"]
    run.update_export(gguf=[GgufRecord(file=parts[0], parts=parts, name="Q8_0")])
    assert "Ollama reads no split GGUF. First make one file of it: llama-gguf-split --merge" in said(
        run, "ollama", capsys
    )


@pytest.mark.parametrize("place", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studio_gets_links_in_its_layout(
    place: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / place / "twintune" / "my-run"
    folder.mkdir(parents=True)
    (folder / "model-Q8_0.gguf").write_text("of an earlier export")
    found = said(run, "lmstudio", capsys)
    assert "twintune/my-run: what an earlier run or export of this name put there is replaced" in found
    assert "in LM Studio: twintune/my-run" in found
    assert sorted(path.name for path in folder.iterdir()) == ["mmproj-BF16.gguf", "model-Q4_K_M.gguf"]
    assert all(path.samefile(run.gguf / path.name) for path in folder.iterdir())


def test_another_disk_gets_copies(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".lmstudio" / "models").mkdir(parents=True)

    def refuse(*given: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    assert "in LM Studio" in said(run, "lmstudio", capsys)
    made = tmp_path / ".lmstudio" / "models" / "twintune" / "my-run" / "model-Q4_K_M.gguf"
    assert made.read_text() == "model-Q4_K_M.gguf"
    assert not made.samefile(run.gguf / made.name)


def test_without_lm_studio_there_is_a_warning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(run, "lmstudio", capsys)
    assert "warning: not put into lmstudio; the export is complete: LM Studio's models folder is not here" in found
    assert "lms import" in found


def test_what_lm_studio_has_stays_where_the_new_file_cannot_be_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / ".lmstudio" / "models" / "twintune" / "my-run" / "model-Q8_0.gguf"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier export")

    def refuse(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "link", refuse)
    monkeypatch.setattr(module.shutil, "copyfile", refuse)
    assert "not put into lmstudio" in said(run, "lmstudio", capsys)
    assert [path.name for path in old.parent.iterdir()] == [old.name]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Pip 2", "pip-2"),
        ("a.b_c-d", "a.b_c-d"),
        ("日本", "model-"),
        ("Pip é", "pip-"),
        ("-x", "x-"),
        ("x" * 90, "x" * 80 + "-"),
    ],
)
def test_the_name_is_one_that_both_take(folder: str, name: str, tmp_path: Path) -> None:
    found = model_name(Run(tmp_path / folder))
    assert re.fullmatch(re.escape(name) + ("[0-9a-f]{8}" if name.endswith("-") else ""), found)
    assert found == model_name(Run(tmp_path / "elsewhere" / folder))


def test_names_of_letters_that_are_left_out_differ(tmp_path: Path) -> None:
    folders = ["日本 語", "日本語", "別の子", "model", "a+b", "a-b", "a" * 81, "a" * 82]
    assert len({model_name(Run(tmp_path / folder)) for folder in folders}) == len(folders)

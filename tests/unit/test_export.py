"""An export with llama.cpp's programs made up: what it leaves, and that no optional part can fail it."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.commands import fuse as module
from common.commands import verify as verify_command
from common.commands.fuse import fuse_run
from common.commands.train import run_training
from common.errors import Unable, UserError
from common.export import gguf, modelfile
from common.export.mlx import most_bits, scheme_of
from common.export.upload import files_of
from common.inference.chat_models import choose
from common.llama_cpp.convert import QuantReport
from common.llama_cpp.install import LlamaCpp
from common.models import sentencepiece
from common.models.model_folder import ModelFolder
from common.options import Options
from common.run_lock import held
from common.run_record import Run
from common.verify.verify import verify_run
from common.verify_record import VerifyRecord
from tests.contexts import context
from tests.tiny import write_rows, write_tiny, write_tokenizer
from tests.tiny_sentencepiece import write_gemma_like, write_llama_like
from tests.unit.bigram import Bigram

LOST = UserError("no luck today", "Try again.")


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    given = {"model": str(tiny_llama), "data": str(write_rows(folder / "rows.jsonl")), "output": str(folder / "run")}
    given |= {"backend": "torch", "device": "cpu", "precision": "fp32", "export": "none", "rank": 2, "steps": 1}
    return run_training(Options.model_validate(given), context(create=Bigram))


class Answering:
    """In place of llama.cpp's server."""

    def __init__(self, *arguments: Any) -> None: ...
    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *error: object) -> None: ...
    def chat(self, *arguments: Any) -> str:
        return "an answer"


def write(source: Path, out: Path, *rest: Any) -> None:
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(b"GGUF")


SMALL = 10**8


def split(gguf: Path, size: int, tool: Path, scratch: Path) -> list[Path]:
    """Two files, unless it is small enough."""
    if size > SMALL:
        return []
    parts = [scratch / f"{gguf.stem}-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"GG")
    return parts


def quantize(source: Path, out: Path, quant: str, llama: Any, progress: Any, imatrix: Path | None) -> QuantReport:
    assert source.is_file()
    assert imatrix is None or imatrix.is_file()
    write(source, out)
    return QuantReport(quant, 4, 4.5, {"Q4_K": 1}, 0)


def fail(*arguments: Any) -> Any:
    raise LOST


@pytest.fixture
def export(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """`go(export="gguf", **options)` exports a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    llama = LlamaCpp(tmp_path, tmp_path, tmp_path, "test", "1")
    monkeypatch.setattr(module, "tools_for", lambda *args: llama)
    monkeypatch.setattr(module, "build_bytes", lambda *args: 0)
    monkeypatch.setattr(module, "verify_held", lambda *args: [])
    monkeypatch.setattr(gguf, "read_report", lambda path, quant: QuantReport(quant, 4, 16.0, {"BF16": 1}, 0))
    stand_ins = {"convert": write, "quantize": quantize, "write_mmproj": write, "Server": Answering, "split": split}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(gguf, name, stand_in)
    monkeypatch.setattr(gguf, "split_tool", lambda *args: tmp_path)
    monkeypatch.setattr(gguf, "make_imatrix", lambda source, calibration, out, *rest: write(source, out))

    def go(form: str = "gguf", **options: Any) -> Run:
        fuse_run(tmp_path / "run", {"export": form, **options}, context("plain"))
        return Run(tmp_path / "run")

    return go


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.gguf.iterdir() if path.suffix == ".gguf")


def test_what_an_export_leaves(export: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = export(imatrix=True, quant=["Q4_K_M", "BF16"])
    assert names(run) == ["imatrix.gguf", "model-BF16.gguf", "model-Q4_K_M-imatrix.gguf"]
    assert run.record.export.sample == {"prompt": run.record.sample_prompt, "answer": "an answer"}
    assert (run.gguf / "Modelfile").is_file()
    assert (run.fused / "README.md").is_file()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("Server", "no sample: no luck today"),
        ("write_modelfile", "no Modelfile: no luck today"),
        ("write_mmproj", "no vision tower: the GGUF takes text only: no luck today"),
        ("make_imatrix", "the types are made without an importance matrix: no luck today"),
        ("write_card", "no model card: no luck today"),
    ],
)
@pytest.mark.slow
def test_an_optional_part_that_fails_is_a_warning(
    part: str,
    words: str,
    export: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gguf if hasattr(gguf, part) else module, part, fail)
    monkeypatch.setattr(ModelFolder, "has_vision", property(lambda self: True))
    monkeypatch.setattr(gguf, "vision_fault", lambda folder: "")
    run = export(imatrix=True, no_verify=True)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning:") == 1
    assert f"warning: {words}" in said
    made = ["imatrix.gguf"] * (part != "make_imatrix") + ["mmproj-BF16.gguf"] * (part != "write_mmproj")
    assert names(run) == [*made, f"model-Q4_K_M{'-imatrix' * (part != 'make_imatrix')}.gguf"]
    assert [report.name for report in run.record.export.gguf] == [names(run)[-1][6:-5]]
    assert (run.gguf / "Modelfile").is_file() == (part != "write_modelfile")
    assert (run.fused / "README.md").is_file() == (part != "write_card")


def test_a_model_whose_template_no_modelfile_can_say_still_gets_one(
    export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def inexpressible(*arguments: Any) -> Any:
        raise modelfile.Inexpressible("it is too clever")

    monkeypatch.setattr(modelfile, "turn_texts", inexpressible)
    run = export()
    assert "has no TEMPLATE for Ollama: it is too clever" in " ".join(capsys.readouterr().out.split())
    assert 'TEMPLATE "' not in (run.gguf / "Modelfile").read_text()


def test_a_modelfile_has_room_for_the_rows_of_training(
    export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(gguf, "write_modelfile", lambda *args: given.extend(args) or modelfile.Modelfile("", "", ()))
    run = export()
    assert given[-1] == run.record.options["max_length"]


def test_an_adapter_as_a_gguf_has_its_chat_template_beside_it(
    export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf, "write_gguf_lora", lambda adapter, base, out, llama: write(base, out))
    run = export("lora-gguf")
    assert (run.gguf / "chat_template.jinja").read_bytes() == run.template.read_bytes()
    assert "--outfile BASE.gguf" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(gguf, "_vocabulary_fault", lambda folder: "it has no tokenizer.model.")
    export("lora-gguf")
    said = " ".join(capsys.readouterr().out.split())
    assert "--outfile" not in said
    assert "warning: that GGUF cannot be made of" in said
    assert "it has no tokenizer.model." in said


@pytest.mark.parametrize(
    ("family", "tokenizer", "fault"),
    [
        ("gemma3_text", write_gemma_like, "it has no tokenizer.model, from which llama.cpp reads this tokenizer."),
        ("mistral", write_llama_like, "it has no tokenizer.model, from which llama.cpp reads this tokenizer."),
        ("gemma3_text", write_tokenizer, "has no tokenizer.model, and llama.cpp cannot convert a gemma3_text"),
        ("llama", write_tokenizer, ""),
    ],
)
def test_a_base_of_which_the_converter_makes_another_tokenizer(
    family: str, tokenizer: Callable[[Path], Any], fault: str, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "base", family, {"vocab_size": 400})
    tokenizer(folder)
    found = gguf._vocabulary_fault(folder)
    assert fault in found
    assert bool(found) == bool(fault)
    if tokenizer is not write_tokenizer:
        sentencepiece.write(folder)
        assert gguf._vocabulary_fault(folder) == ""


def test_an_mlx_folder_that_fails_leaves_the_rest_complete(
    export: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what was asked for, so the exit status says so, at the end."""
    monkeypatch.setattr(module, "write_mlx_model", fail)
    with pytest.raises(UserError, match="no luck today"):
        export("mlx")
    run = Run(tmp_path / "run")
    assert (run.fused / "README.md").is_file()
    assert (run.record.export.fused, run.record.export.mlx) == ("fused", None)
    assert "fuse" in run.record.export.stages


def test_a_failed_export_leaves_no_intermediate_gguf(
    export: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "quantize", fail)
    with pytest.raises(UserError, match="no luck today"):
        export(imatrix=True)
    assert names(Run(tmp_path / "run")) == ["imatrix.gguf"]


def test_what_a_killed_export_left_goes_with_the_next(export: Callable[..., Run], tmp_path: Path) -> None:
    left = tmp_path / "run" / "gguf"
    left.mkdir()
    for name in ("model-BF16.gguf", "model-Q4_K_M-00002-of-00003.gguf"):
        (left / name).write_bytes(b"old")
    (tmp_path / "run" / "fused" / ".twintune-ffffffff-7-1-model").mkdir(parents=True)
    run = export()
    assert names(run) == ["model-Q4_K_M.gguf"]
    assert list(run.path.rglob(".twintune-*")) == []


def test_a_broken_verdict_stays_until_its_ggufs_are_replaced(export: Callable[..., Run]) -> None:
    """Whatever else is made again; of a sound run the fused folder alone is no longer known to be."""
    run = export(quant=["Q4_K_M", "Q8_0"])
    run.update(verify=VerifyRecord(verdict="sound"))
    assert export("fused").record.verify is None
    assert [report.name for report in run.record.export.gguf] == ["Q4_K_M", "Q8_0"]
    run.update(verify=VerifyRecord(verdict="broken"))
    for again in (("fused", {}), ("gguf", {"quant": ["Q8_0"], "no_verify": True})):
        verdict = export(again[0], **again[1]).record.verify
        assert verdict is not None
        assert verdict.verdict == "broken"
    assert export(quant=["Q4_K_M", "Q8_0"], no_verify=True).record.verify is None


def test_a_machine_that_cannot_verify_calls_no_run_broken(
    export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unable(*given: Any) -> None:
        raise Unable("The model does not fit into memory.", "Close other programs.")

    monkeypatch.setattr(module, "verify_held", unable)
    run = export()
    assert run.record.verify is None
    assert run.gguf.is_dir()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "not verified: The model does not fit into memory. To verify it later: python cli.py verify" in said


def test_a_card_that_cannot_be_written_fails_no_verification(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Run) -> None:
        with pytest.raises(UserError, match="by another process"), held(run.path):
            pass  # the run is held meanwhile
        raise PermissionError("a read-only folder")

    monkeypatch.setattr(verify_command, "verify_run", lambda *args: [])
    monkeypatch.setattr(verify_command, "write_card", refused)
    assert verify_command.run(argparse.Namespace(run=finished), context("plain")) == 0
    assert "warning: no model card: PermissionError: a read-only folder" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [verify_run, fuse_run])
def test_every_command_that_holds_a_run_removes_what_was_left_there(
    command: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    left = run / "gguf" / ".twintune-ffffffff-7-1-scratch"
    left.mkdir(parents=True)
    (left / "large").write_text("x")
    with pytest.raises(UserError):
        command(run, *([context()] if command is verify_run else [{"export": "none"}, context()]))
    assert not left.exists()


# --- the importance matrix


def test_the_importance_matrix_is_kept_and_used_again(
    export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = export(imatrix=True, quant=["IQ2_M"])
    monkeypatch.setattr(gguf, "make_imatrix", fail)
    monkeypatch.setattr(module, "data_of", lambda *given: pytest.fail("the data are asked for"))
    export(imatrix=True, quant=["IQ3_XXS"])
    assert "the run's importance matrix is used again" in " ".join(capsys.readouterr().out.split())
    assert names(run) == ["imatrix.gguf", "model-IQ2_M-imatrix.gguf", "model-IQ3_XXS-imatrix.gguf"]
    (run.path / str(run.record.export.imatrix)).unlink()
    monkeypatch.setattr(module, "data_of", lambda *given: None)
    with pytest.raises(UserError, match="no luck today"):  # is made again
        export(imatrix=True, quant=["IQ3_XXS"])


def test_a_matrix_of_other_weights_is_not_used(export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = export(imatrix=True)
    run.update_export(fuse_into="dequantized")
    monkeypatch.setattr(gguf, "make_imatrix", fail)
    with pytest.raises(UserError, match="no luck today"):
        export(imatrix=True, quant=["IQ2_M"])
    assert run.record.export.imatrix is None


def test_a_matrix_that_was_given_is_used_and_not_kept(
    export: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "theirs.gguf"
    given.write_bytes(b"GGUF")
    used: list[Path | None] = []

    def quantized(source: Path, out: Path, quant: str, llama: Any, progress: Any, matrix: Path | None) -> QuantReport:
        used.append(matrix)
        return quantize(source, out, quant, llama, progress, matrix)

    monkeypatch.setattr(gguf, "quantize", quantized)
    run = export(imatrix_file=str(given), quant=["IQ2_M", "Q8_0"])
    assert used == [given, None]
    assert names(run) == ["model-IQ2_M-imatrix.gguf", "model-Q8_0.gguf"]


@pytest.mark.parametrize("quant", ["IQ2_M", "IQ3_XS", "Q2_K_S"])
def test_a_type_that_needs_a_matrix_is_refused_without_one(quant: str, export: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=f"{quant} cannot be made without an importance matrix: add --imatrix"):
        export(quant=["Q4_K_M", quant])
    assert names(export(quant=["IQ4_XS", "IQ4_NL", "IQ3_M", "IQ3_S"], no_verify=True)) == [
        f"model-{name}.gguf" for name in ("IQ3_M", "IQ3_S", "IQ4_NL", "IQ4_XS")
    ]


# --- split files


def test_a_split_gguf_replaces_the_whole_one_and_is_replaced_by_it(export: Callable[..., Run]) -> None:
    parts = [f"model-Q4_K_M-0000{number}-of-00002.gguf" for number in (1, 2)]
    run = export()
    assert names(run) == ["model-Q4_K_M.gguf"]
    assert names(export(split_size="1MB")) == parts
    (report,) = run.record.export.gguf
    assert (report.file, report.name, report.bytes) == (f"gguf/{parts[0]}", "Q4_K_M", 4)
    assert report.files == [f"gguf/{part}" for part in parts]
    made = (run.gguf / "Modelfile").read_text()
    assert f"# Ollama reads no split GGUF. First make one file of it: llama-gguf-split --merge {parts[0]} " in made
    assert "FROM ./model-Q4_K_M.gguf" in made
    card = (run.fused / "README.md").read_text()
    assert f"`gguf/{parts[0]}` and 1 more, which it reads as one: for llama.cpp" in card
    assert f"llama-server -m gguf/{parts[0]} --jinja" in card
    assert f"    llama-gguf-split --merge gguf/{parts[0]} gguf/model-Q4_K_M.gguf\n    ollama create" in card
    assert {"gguf/" + part for part in parts} <= {file.target for file in files_of(run, [])}
    assert choose(run.path, None, None).path == run.gguf / parts[0]
    (run.gguf / parts[1]).unlink()
    with pytest.raises(UserError, match="has no GGUF"):
        choose(run.path, None, None)
    assert names(export(split_size="9GB")) == ["model-Q4_K_M.gguf"]


def test_a_split_bf16_gguf_leaves_no_whole_one(export: Callable[..., Run]) -> None:
    run = export(quant=["BF16", "Q8_0"], split_size="1MB")
    assert names(run) == [f"model-{name}-0000{part}-of-00002.gguf" for name in ("BF16", "Q8_0") for part in (1, 2)]
    assert [report.name for report in run.record.export.gguf] == ["BF16", "Q8_0"]


# --- putting it into other programs


def test_install_alone_makes_nothing_again(export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[list[str]] = []

    def install(run: Run, programs: list[str], display: Any) -> list[str]:
        put.append(programs)
        return failed

    failed: list[str] = []
    monkeypatch.setattr(module, "install", install)
    run = export(install=["ollama"])
    monkeypatch.setattr(gguf, "convert", fail)
    fuse_run(run.path, {"install": ["lmstudio"]}, context())
    export("fused")
    assert put == [["ollama"], ["lmstudio"], []]
    failed.append("lmstudio")
    with pytest.raises(UserError, match="was not put into lmstudio"):
        fuse_run(run.path, {"install": ["lmstudio"]}, context())
    run.update(verify=VerifyRecord(verdict="broken"))
    with pytest.raises(UserError, match=r"`verify` calls .* broken"):
        fuse_run(run.path, {"install": ["lmstudio"]}, context())


def test_the_bits_of_an_mlx_folder(export: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def made(fused: Path, out: Path, progress: Any, scheme: str) -> dict[str, Any]:
        asked.append(scheme)
        return {"folder": "mlx", "bytes": 1, "scheme": scheme, "bits": 4, "group_size": 64}

    monkeypatch.setattr(module, "write_mlx_model", made)
    export("mlx")
    fuse_run(tmp_path / "run", {"mlx_bits": "mixed-4-6"}, context())  # names the export
    monkeypatch.setattr(ModelFolder, "parameter_count", 10**9)
    export("mlx")
    assert asked == ["8", "mixed-4-6", "4"]
    for given, kept in ((4, "4"), ("mixed_4_6", "mixed-4-6")):  # a number in YAML, mlx-lm's own spelling
        assert Options.model_validate({"mlx_bits": given}).mlx_bits == kept
    assert (scheme_of(None, ModelFolder(tmp_path)), most_bits("mixed-4-6"), most_bits("4")) == ("4", 6, 4)

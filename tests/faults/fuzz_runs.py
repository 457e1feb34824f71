"""Readers of a run folder, which may be a stranger's or another version's."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from common.commands.compare import compare
from common.commands.fuse import fuse_run
from common.commands.train import run_training
from common.display import Display
from common.errors import UserError
from common.export.model_card import card, parts_of
from common.export.upload import Upload, push
from common.inference.chat_models import choose
from common.options import Options
from common.report.page import write_report
from common.run_fields import GgufRecord
from common.run_record import Run
from common.training import checkpoint
from common.training.metrics import Metrics
from common.training.resume import resume_run, resumed_options
from common.verify.cases import cases_of
from common.verify.divergence import choose_positions
from common.verify.verify import verify_run
from tests.contexts import context
from tests.faults import mutations
from tests.faults.fuzz_models import contents, write_gguf
from tests.faults.reader import Case, Reader, each
from tests.tiny import write_model, write_rows
from tests.unit.bigram import Bigram


def _finished(folder: Path) -> Path:
    """A run of six steps on a tiny model, with a fused folder, and a GGUF on record."""
    write_model(folder / "tiny")
    given: dict[str, Any] = {"model": str(folder / "tiny"), "data": str(write_rows(folder / "rows.jsonl"))}
    given |= {"backend": "torch", "device": "cpu", "precision": "fp32", "export": "fused", "rank": 2}
    given |= {"steps": 6, "eval_every": 2, "save_every": 2, "output": str(folder / "run")}
    run = Run(run_training(Options.model_validate(given), context(create=Bigram)))
    run.gguf.mkdir()
    write_gguf(run.gguf / "model-Q4_K_M.gguf")
    made = GgufRecord(file="gguf/model-Q4_K_M.gguf", name="Q4_K_M", quant="Q4_K_M", bytes=9, tensors={"F32": 3})
    run.update_export(gguf=[made], sample={"prompt": [], "answer": "a"})
    return run.path


_RECORDS = (
    *("run.json", "recipe.yaml", "plan.yaml", "metrics.jsonl", "environment.json", "verify-cases.json"),
    "report.json",
)


def records(folder: Path) -> Reader:
    """Every command that looks at a run: chat, compare, push, its card, resume, fuse and verify."""
    run = _finished(folder)
    shutil.copytree(run, folder / "other")
    good = {name: data for name, data in contents(folder).items() if name.startswith("run/")}
    changed = {name: data for name, data in good.items() if name.removeprefix("run/") in (*_RECORDS, *_CONFIGS)}

    def read(case: Case) -> None:
        try:
            _every_command(run, folder / "other")
        finally:  # resume and fuse write
            for path in [path for path in run.rglob("*") if path.is_file()]:
                if str(path.relative_to(folder)) not in good:
                    path.unlink()
            for name, data in good.items():
                if name not in case:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(data)

    return Reader(folder, changed, read, mutations.files(changed), limit=20)


_CONFIGS = ("fused/config.json", "fused/generation_config.json", "fused/tokenizer_config.json")
_CONFIGS += ("adapter/adapter_config.json", "chat_template.jinja")


def _every_command(run: Path, other: Path) -> None:
    folder = Run(run)
    each(
        *(partial(choose, run, kind, None) for kind in ("gguf", "adapter", "fused", "base")),
        lambda: compare([run, other], Display("quiet")),
        lambda: compare([other, run], Display("quiet")),
        lambda: push(run, "owner/name", Upload(dry_run=True, anyway=True), Display("quiet")),
        lambda: card(folder, parts_of(folder)),
        lambda: write_report(folder),
        lambda: resumed_options(Options.model_validate({"resume": str(run)}), folder),
        lambda: _verify(run),
        lambda: choose_positions(cases_of(folder, other.parent / "tiny").rows, 259),
        lambda: Metrics(run / "metrics.jsonl", 3, True, print).close(),
        lambda: fuse_run(run, {"export": "fused"}, context()),
        lambda: resume_run(folder, folder.recipe, folder.plan, print),  # the run is no longer complete
    )


def _verify(run: Path) -> None:
    """Up to where llama.cpp would be started."""
    try:
        verify_run(run, context(llama_cpp="/nowhere"))
    except UserError as error:
        if not error.what.startswith("--llama-cpp"):
            raise


def checkpoints(folder: Path) -> Reader:
    """The newest checkpoint, its hashes made right: a stranger's may be changed in any file."""
    run = _finished(folder)
    newest = max((run / "checkpoints").iterdir())
    for old in (run / "checkpoints").iterdir():
        if old != newest:
            shutil.rmtree(old)
    good = {name: data for name, data in contents(folder).items() if name.startswith("run/checkpoints")}

    def read(case: Case) -> None:
        if case[marker] == good[marker]:
            names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
            hashes = {name: checkpoint.file_digest(newest / name) for name in names if name != "COMPLETE"}
            (folder / marker).write_text(json.dumps(hashes))
        checkpoint.latest(run)
        checkpoint.latest_step(run)

    marker = next(name for name in good if name.endswith("COMPLETE"))

    def with_marker(case: Case) -> Case:
        return {marker: good[marker]} | case

    return Reader(folder, good, read, st.builds(with_marker, mutations.files(good)))

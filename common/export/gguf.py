"""The GGUFs of a run: converted, quantized, put on record, shown and tried; and the adapter alone as a GGUF."""

import json
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.data.sources import data_of, encoder_of
from common.display import Display
from common.errors import UserError
from common.export.budget import StageMeter
from common.export.job import ExportJob
from common.export.modelfile import write_modelfile
from common.files import scratch_folder
from common.llama_cpp.convert import QuantReport, advice, convert, quantize
from common.llama_cpp.convert import report as read_report
from common.llama_cpp.convertible import check_convertible
from common.llama_cpp.imatrix import calibration_of, make_imatrix
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import write_gguf_lora
from common.llama_cpp.mmproj import vision_fault, write_mmproj
from common.llama_cpp.server import AS_WRITTEN, Server, ServerOptions
from common.llama_cpp.split import split, split_tool
from common.model_files import copy_template, names_code
from common.models import sentencepiece
from common.models.model_folder import ModelFolder
from common.option_fields import NEED_IMATRIX, UNGUIDED
from common.options import read_size
from common.paths import source_name, user_path
from common.run_fields import GgufRecord
from common.run_record import Run

SAMPLE_TOKENS = 100
MMPROJ = "mmproj-BF16.gguf"


def write_ggufs(job: ExportJob, llama: LlamaCpp, meter: StageMeter, bf16_gguf: Path) -> None:
    """Make the GGUFs of the fused folder, each on record as soon as it is made, and show them; `bf16_gguf` is first.

    A vision tower that cannot be made is a warning, and so is an importance matrix that no type needs.
    """
    run, options, display = job.run, job.options, job.display
    name = source_name(options.model)
    earlier = [report for report in run.record.export.gguf if run.has_gguf(report)]
    reports: list[GgufRecord] = []
    with display.stage("gguf") as progress:
        with meter.stage("convert", bf16_gguf):
            convert(run.fused, bf16_gguf, name, llama, lambda share, text: progress(share / 2, text))
        matrix = _importance(job, llama, meter, bf16_gguf, progress)
        for report in quantize_each(job, llama, meter, bf16_gguf, matrix, progress):
            reports.append(report)
            names = {report.name for report in reports}
            run.update_export(gguf=[*reports, *(report for report in earlier if report.name not in names)])
            _remove_others(run, report, bf16_gguf)
        if len(reports) == len(run.record.export.gguf):
            run.update(verify=None)  # that was of others
        with display.optional("no vision tower: the GGUF takes text only"):
            if ModelFolder(run.fused).has_vision and not vision_fault(run.fused):
                with meter.stage("convert", tower := run.gguf / MMPROJ):
                    write_mmproj(run.fused, tower, name, llama, lambda share, text: progress(1.0, text))
                run.update_export(mmproj=str(tower.relative_to(run.path)))
    _show(run, reports, bf16_gguf, llama, display)


def kept_matrix(run: Run, fuse_into: str | None) -> Path | None:
    """The run's own importance matrix, where it has one of the weights that are fused so."""
    export = run.record.export
    known = export.imatrix if export.fuse_into == fuse_into else None
    return run.path / known if known and (run.path / known).is_file() else None


def _importance(job: ExportJob, llama: LlamaCpp, meter: StageMeter, bf16_gguf: Path, progress: Progress) -> Path | None:
    """The importance matrix that was given, the run's own, or one of the training rows, which then is the run's."""
    run, options = job.run, job.options
    if options.imatrix_file:
        return user_path(options.imatrix_file, "--imatrix-file").absolute()
    if not options.imatrix:
        return None
    if known := kept_matrix(run, options.fuse_into):
        job.display.say(f"the run's importance matrix is used again: {known}")
        return known
    needed = any(quant in NEED_IMATRIX for quant in options.quant)
    matrix = run.gguf / "imatrix.gguf"
    with nullcontext() if needed else job.display.optional("the types are made without an importance matrix"):
        with meter.stage("imatrix", matrix):
            rows = data_of(run, options).train
            calibration = calibration_of(rows, encoder_of(job.base.path, options, run.recipe))
            make_imatrix(bf16_gguf, calibration, matrix, llama, progress)
        run.update_export(imatrix=str(matrix.relative_to(run.path)))
        return matrix
    return None


def _remove_others(run: Run, made: GgufRecord, bf16_gguf: Path) -> None:
    """Remove what an earlier export left under the name of `made`: in one file, or split at other places."""
    kept = {bf16_gguf, *(run.path / file for file in made.files)}
    for path in [*run.gguf.glob(f"model-{made.name}.gguf"), *run.gguf.glob(f"model-{made.name}-?????-of-?????.gguf")]:
        if path not in kept:
            path.unlink()


def _show(run: Run, reports: list[GgufRecord], bf16_gguf: Path, llama: LlamaCpp, display: Display) -> None:
    display.table(
        "GGUF",
        ["file", "size", "bits per weight", "tensors by type", "fallbacks"],
        [
            [
                str(run.path / report.file) + (f" and {len(report.parts) - 1} more" if report.parts else ""),
                f"{report.bytes / 1e6:.1f} MB",
                f"{report.bits_per_weight:.2f}",
                ", ".join(f"{count} {kind}" for kind, count in report.tensors.items()),
                str(report.fallbacks),
            ]
            for report in reports
        ],
    )
    if any(report.fallbacks for report in reports):
        display.say(
            "fallbacks: tensors whose rows are not divisible by 256 cannot take a K-quant or IQ type; llama.cpp gave "
            "them a larger type, so the file is bigger than its name suggests."
        )
        known = [QuantReport(**{k: getattr(report, k) for k in QuantReport.__dataclass_fields__}) for report in reports]
        if better := advice(bf16_gguf, known, llama):
            display.say(better)
    if run.record.export.mmproj:
        tower = run.path / run.record.export.mmproj
        display.say(f"its vision tower, for images: llama-server -m {run.path / reports[0].file} --mmproj {tower}")


def try_gguf(job: ExportJob, llama: LlamaCpp) -> None:
    """Give the first GGUF the run's sample prompt, show its answer and put it on record, and write a Modelfile.

    Neither can fail an export: a warning says what is missing.
    """
    record = job.run.record
    first = record.export.gguf[0]
    gguf, prompt = job.run.path / first.file, record.sample_prompt
    if prompt:
        tokens = record.sample_tokens
        if tokens is None:  # an older version's run has no count; a token has at least a byte
            tokens = len(json.dumps(prompt, ensure_ascii=False).encode())
        context = tokens + SAMPLE_TOKENS + _SPARE
        options = ServerOptions(context, flags=AS_WRITTEN)
        with job.display.optional("no sample"), Server(llama, gguf, options) as server:
            answer = server.chat(prompt, SAMPLE_TOKENS, record.sample_tools)
            job.run.update_export(sample={"prompt": prompt, "answer": answer})
            job.display.sample(f"llama.cpp, from {gguf.name}", str(prompt[-1]["content"]), answer)
    with job.display.optional("no Modelfile"):
        _write_modelfile(job, first, prompt)


_SPARE = 64  # tokens that llama.cpp's prompt may have beyond training's count, such as a second BOS


def write_lora(job: ExportJob, llama: LlamaCpp, meter: StageMeter) -> None:
    """Make a GGUF of the adapter alone, put it on record, and show the command that runs it."""
    out, folder, display = job.run.gguf / "adapter.gguf", job.base.path, job.display
    with meter.stage("lora", out), display.stage("lora-gguf"):
        write_gguf_lora(job.adapter, folder, out, llama)
    job.run.update_export(lora_gguf=str(out.relative_to(job.run.path)))
    model = job.options.model or ""
    base = model if model.endswith(".gguf") else "BASE.gguf"
    command = [llama.server, "-m", base, "--lora", out]
    if job.served.template is not None:  # the base's own may give other prompts than training had
        copy_template(job.run.path, out.parent)
        command += ["--jinja", "--chat-template-file", job.run.template]
    display.say(f"run it with the base model's GGUF: {shlex.join(map(str, command))}")
    if base == "BASE.gguf" and names_code(folder):
        display.warn(f"{folder} holds or names code of its own, which llama.cpp's converter may run: review it first")
    elif base == "BASE.gguf" and (fault := _vocabulary_fault(folder)):
        display.warn(f"that GGUF cannot be made of {folder} as it is: {fault}")
    elif base == "BASE.gguf":
        command = ["python", llama.converter, folder, "--outfile", base]
        display.say(f"make that GGUF by: {shlex.join(map(str, command))}")


def _vocabulary_fault(folder: Path) -> str:
    """Why llama.cpp's converter would make another tokenizer of the folder, which it takes as it is; or ""."""
    try:
        check_convertible(folder)
        needed = not (folder / sentencepiece.NAME).is_file() and sentencepiece.rebuild_checked(folder) is not None
    except UserError as error:
        return f"{error.what} {error.fix}"
    return f"it has no {sentencepiece.NAME}, from which llama.cpp reads this tokenizer." if needed else ""


def _write_modelfile(job: ExportJob, of: GgufRecord, prompt: list[dict[str, Any]]) -> None:
    gguf = job.run.gguf / f"model-{of.name}.gguf"  # of one that is split, the file that Ollama needs
    parts = [Path(part).name for part in of.parts]
    longest, thinking = job.options.max_length, job.run.recipe.thinking
    made = write_modelfile(job.run.fused, gguf, job.served.stops, thinking, prompt, parts, longest)
    if made.missing:
        job.display.warn(f"{gguf.parent / 'Modelfile'} has no TEMPLATE for Ollama: {made.missing}")
    for note in made.notes:
        job.display.say(f"Modelfile for Ollama: {note}")


def quantize_each(
    job: ExportJob, llama: LlamaCpp, meter: StageMeter, bf16_gguf: Path, matrix: Path | None, progress: Progress
) -> Iterator[GgufRecord]:
    """Make `model-<type>.gguf` beside `bf16_gguf` for every type of --quant; yields the report of each."""
    quants = job.options.quant
    for number, quant in enumerate(quants):
        guided = None if quant in UNGUIDED else matrix
        target = bf16_gguf.with_name(f"model-{quant}{'-imatrix' if guided else ''}.gguf")
        share_of_all = partial(_advance, progress, number, len(quants))
        if target == bf16_gguf:
            report = read_report(bf16_gguf, quant)
        elif quant == "F32":  # of the fused weights, which may be more exact than the bf16 file
            with meter.stage("quantize", target):
                convert(job.run.fused, target, source_name(job.options.model), llama, share_of_all, "f32")
            report = read_report(target, quant)
        else:
            with meter.stage("quantize", target):
                report = quantize(bf16_gguf, target, quant, llama, share_of_all, guided)
        yield _recorded(job, llama, meter, target, report)


def _recorded(job: ExportJob, llama: LlamaCpp, meter: StageMeter, gguf: Path, report: QuantReport) -> GgufRecord:
    """The record of a GGUF, in several files where it is larger than --split-size; the one file of it stays."""
    name, run, files = gguf.stem.removeprefix("model-"), job.run, [gguf]
    if job.options.split_size:
        with scratch_folder(run.gguf) as scratch:
            tool = split_tool(llama, lambda share, text: None)
            with meter.stage("split", scratch):
                parts = split(gguf, read_size(job.options.split_size), tool, scratch)
            files = [part.replace(run.gguf / part.name) for part in parts] or files
    size = sum(file.stat().st_size for file in files)
    shown = [str(file.relative_to(run.path)) for file in files]
    facts = asdict(report) | {"bytes": size}
    return GgufRecord(name=name, file=shown[0], parts=shown if len(shown) > 1 else [], **facts)


def _advance(progress: Progress, number: int, count: int, share: float, text: str) -> None:
    """Report that quantization `number` of `count` is done by `share`; the conversion was the first half."""
    progress(0.5 + (number + share) / count / 2, text)

"""The GGUFs of a run: converted, quantized, put on record, shown and tried; and the adapter alone as a GGUF."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.data.sources import data_of, encoder_of
from common.display import Display
from common.export.budget import StageMeter
from common.export.job import ExportJob
from common.export.modelfile import write_modelfile
from common.llama_cpp.convert import QuantReport, advice, convert, quantize
from common.llama_cpp.convert import report as read_report
from common.llama_cpp.imatrix import calibration_of, make_imatrix
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import write_gguf_lora
from common.llama_cpp.mmproj import vision_fault, write_mmproj
from common.llama_cpp.server import Server, ServerOptions
from common.model_files import names_code
from common.models.model_folder import ModelFolder
from common.option_faults import UNGUIDED
from common.paths import source_name
from common.run_fields import GgufRecord
from common.run_record import Run

SAMPLE_TOKENS = 100
MMPROJ = "mmproj-BF16.gguf"


def write_ggufs(job: ExportJob, llama: LlamaCpp, meter: StageMeter, bf16_gguf: Path) -> None:
    """Make the GGUFs of the fused folder, each on record as soon as it is made, and show them; `bf16_gguf` is first.

    An importance matrix or a vision tower that cannot be made is a warning.
    """
    run, options, display = job.run, job.options, job.display
    name = source_name(options.model)
    earlier = [report for report in run.record.export.gguf if (run.path / report.file).is_file()]
    reports: list[GgufRecord] = []
    matrix = run.gguf / "imatrix.gguf"
    with display.stage("gguf") as progress, _intermediate(matrix):
        with meter.stage("convert", bf16_gguf):
            convert(run.fused, bf16_gguf, name, llama, lambda share, text: progress(share / 2, text))
        if options.imatrix:
            with display.optional("the types are made without an importance matrix"), meter.stage("imatrix", matrix):
                rows = data_of(run, options).train
                calibration = calibration_of(rows, encoder_of(job.base.path, options, run.recipe))
                make_imatrix(bf16_gguf, calibration, matrix, llama, progress)
        for report in quantize_each(bf16_gguf, options.quant, matrix, llama, progress, meter):
            reports.append(report)
            names = {report.name for report in reports}
            run.update_export(gguf=[*reports, *(report for report in earlier if report.name not in names)])
        if len(reports) == len(run.record.export.gguf):
            run.update(verify=None)  # that was of others
        with display.optional("no vision tower: the GGUF takes text only"):
            if ModelFolder(run.fused).has_vision and not vision_fault(run.fused):
                with meter.stage("convert", tower := run.gguf / MMPROJ):
                    write_mmproj(run.fused, tower, name, llama, lambda share, text: progress(1.0, text))
                run.update_export(mmproj=str(tower.relative_to(run.path)))
    _show(run, reports, bf16_gguf, llama, display)


def _show(run: Run, reports: list[GgufRecord], bf16_gguf: Path, llama: LlamaCpp, display: Display) -> None:
    display.table(
        "GGUF",
        ["file", "size", "bits per weight", "tensors by type", "fallbacks"],
        [
            [
                str(run.path / report.file),
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
            "fallbacks: tensors whose rows are not divisible by 256 cannot take a K-quant; llama.cpp gave them a "
            "larger type, so the file is bigger than its name suggests."
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
    gguf, prompt = job.run.path / record.export.gguf[0].file, record.sample_prompt
    if prompt:
        tokens = record.sample_tokens
        if tokens is None:  # an older version's run has no count; a token has at least a byte
            tokens = len(json.dumps(prompt, ensure_ascii=False).encode())
        context = tokens + SAMPLE_TOKENS + _SPARE
        with job.display.optional("no sample"), Server(llama, gguf, ServerOptions(context)) as server:
            answer = server.chat(prompt, SAMPLE_TOKENS)
            job.run.update_export(sample={"prompt": prompt, "answer": answer})
            job.display.sample(f"llama.cpp, from {gguf.name}", str(prompt[-1]["content"]), answer)
    with job.display.optional("no Modelfile"):
        _write_modelfile(job, gguf, prompt)


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
        command += ["--jinja", "--chat-template-file", job.run.template]
    display.say(f"run it with the base model's GGUF: {shlex.join(map(str, command))}")
    if base == "BASE.gguf" and names_code(folder):
        display.warn(f"{folder} holds or names code of its own, which llama.cpp's converter may run: review it first")
    elif base == "BASE.gguf":
        command = ["python", llama.converter, folder, "--outfile", base]
        display.say(f"make that GGUF by: {shlex.join(map(str, command))}")


def _write_modelfile(job: ExportJob, gguf: Path, prompt: list[dict[str, Any]]) -> None:
    made = write_modelfile(job.run.fused, gguf, job.served.stops, job.run.recipe.thinking, prompt)
    if made.missing:
        job.display.warn(f"{gguf.parent / 'Modelfile'} has no TEMPLATE for Ollama: {made.missing}")
    for note in made.notes:
        job.display.say(f"Modelfile for Ollama: {note}")


@contextmanager
def _intermediate(path: Path) -> Iterator[None]:
    """Around the use of a file that is not there before, left by a killed process, nor afterwards."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def quantize_each(
    bf16_gguf: Path, quants: list[str], matrix: Path, llama: LlamaCpp, progress: Progress, meter: StageMeter
) -> Iterator[GgufRecord]:
    """Make `model-<type>.gguf` beside `bf16_gguf` for every type of --quant; yields the report of each.

    matrix: the importance matrix, where that file exists.
    """
    out = bf16_gguf.parent
    for number, quant in enumerate(quants):
        guided = matrix if quant not in UNGUIDED and matrix.is_file() else None
        target = out / f"model-{quant}{'-imatrix' if guided else ''}.gguf"
        if target == bf16_gguf:
            report = read_report(bf16_gguf, quant)
        else:
            share_of_all = partial(_advance, progress, number, len(quants))
            with meter.stage("quantize", target):
                report = quantize(bf16_gguf, target, quant, llama, share_of_all, guided)
        file = str(target.relative_to(out.parent))
        yield GgufRecord(name=target.stem.removeprefix("model-"), file=file, **asdict(report))


def _advance(progress: Progress, number: int, count: int, share: float, text: str) -> None:
    """Report that quantization `number` of `count` is done by `share`; the conversion was the first half."""
    progress(0.5 + (number + share) / count / 2, text)

"""The GGUFs of a run: converted, weighed, quantized, shown, tried; and the adapter alone as one."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import run_record
from common.backend import Progress
from common.data.load import data_of, encoder_of
from common.export.budget import StageMeter
from common.export.job import ExportJob
from common.export.modelfile import write_modelfile
from common.llama_cpp.convert import QuantReport, advice, convert, quantize
from common.llama_cpp.convert import report as read_report
from common.llama_cpp.imatrix import calibration_text, make_imatrix
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import write_gguf_lora
from common.llama_cpp.mmproj import vision_fault, write_mmproj
from common.llama_cpp.server import Server
from common.model_files import names_code
from common.models.load import TEMPLATE
from common.models.model_folder import ModelFolder
from common.options import UNGUIDED, Options, source_name

SAMPLE_TOKENS = 100
WHOLE = "model-BF16.gguf"  # what the others are quantized from, and proven against
MMPROJ = "mmproj-BF16.gguf"


def write_ggufs(job: ExportJob, llama: LlamaCpp, meter: StageMeter) -> None:
    """Make the GGUFs of the fused folder, each on record as soon as it is there, and show them; WHOLE stays too."""
    run, options, display = job.run, job.options, job.display
    recipe = run_record.read_recipe(run)
    calibration = None
    if options.imatrix:
        rows = data_of(run, options, recipe).train
        calibration = calibration_text(rows, encoder_of(job.folder.path, options, recipe))
    earlier = [report for report in job.kept().get("gguf", []) if (run / report["file"]).is_file()]
    reports: list[dict[str, Any]] = []
    with display.stage("gguf") as progress:
        making = convert_and_quantize(run / "fused", run / "gguf", options, llama, progress, meter, calibration)
        for report in making:
            reports.append(report)
            names = {report["name"] for report in reports}
            job.keep(gguf=[*reports, *(report for report in earlier if report.get("name") not in names)])
    display.table(
        "GGUF",
        ["file", "size", "bits a weight", "tensors by type", "fallbacks"],
        [
            [
                str(run / report["file"]),
                f"{report['bytes'] / 1e6:.1f} MB",
                f"{report['bits_per_weight']:.2f}",
                ", ".join(f"{count} {kind}" for kind, count in report["tensors"].items()),
                str(report["fallbacks"]),
            ]
            for report in reports
        ],
    )
    if any(report["fallbacks"] for report in reports):
        display.say(
            "fallbacks: tensors whose rows are not divisible by 256 cannot take a K-quant; llama.cpp gave them a "
            "larger type, so the file is bigger than its name suggests."
        )
        known = [QuantReport(**{k: report[k] for k in QuantReport.__dataclass_fields__}) for report in reports]
        if better := advice(run / "gguf" / WHOLE, known, llama):
            display.say(better)
    if (tower := run / "gguf" / MMPROJ).is_file():
        job.keep(mmproj=str(tower.relative_to(run)))
        display.say(f"its vision tower, for images: llama-server -m {run / reports[0]['file']} --mmproj {tower}")


def try_gguf(job: ExportJob, llama: LlamaCpp) -> None:
    """Ask the first GGUF the run's sample prompt, show and keep its answer, and write its Modelfile.

    Neither can fail an export: a warning says what is missing.
    """
    known = run_record.read_run(job.run)
    gguf, prompt = job.run / job.kept()["gguf"][0]["file"], known["sample_prompt"]
    if prompt:
        # a run of an older version does not know its prompt's length; a token has at least a byte
        tokens = known.get("sample_tokens", len(json.dumps(prompt, ensure_ascii=False).encode()))
        context = tokens + SAMPLE_TOKENS + _SPARE
        with job.display.optional("no sample"), Server(llama, gguf, context=context) as server:
            answer = server.chat(prompt, SAMPLE_TOKENS)
            job.keep(sample={"prompt": prompt, "answer": answer})
            job.display.sample(f"llama.cpp, from {gguf.name}", str(prompt[-1]["content"]), answer)
    with job.display.optional("no Modelfile"):
        _write_modelfile(job, gguf, prompt)


_SPARE = 64  # tokens that llama.cpp may prompt beyond what training counted, such as a second BOS


def write_lora(job: ExportJob, llama: LlamaCpp, meter: StageMeter) -> None:
    """Make a GGUF of the adapter alone, put it on record, and say how to run it."""
    out, folder, display = job.run / "gguf" / "adapter.gguf", job.folder.path, job.display
    with meter.stage("lora", out), display.stage("lora-gguf"):
        write_gguf_lora(job.final, folder, out, llama)
    job.keep(lora_gguf=str(out.relative_to(job.run)))
    model = job.options.model or ""
    base = model if model.endswith(".gguf") else "BASE.gguf"
    command = [llama.server, "-m", base, "--lora", out]
    if job.served.template is not None:  # the base's own may prompt otherwise than training did
        command += ["--jinja", "--chat-template-file", job.run / TEMPLATE]
    display.say(f"run it over the base model's GGUF: {shlex.join(map(str, command))}")
    if base == "BASE.gguf" and names_code(folder):
        display.warn(f"{folder} holds or names code of its own, which llama.cpp's converter may run: see to that first")
    elif base == "BASE.gguf":
        command = ["python", llama.converter, folder, "--outfile", base]
        display.say(f"which is made by: {shlex.join(map(str, command))}")


def _write_modelfile(job: ExportJob, gguf: Path, prompt: list[dict[str, Any]]) -> None:
    thinking = run_record.read_recipe(job.run).thinking
    made = write_modelfile(job.run / "fused", gguf, job.served.stops, thinking, prompt)
    if made.missing:
        job.display.warn(f"{gguf.parent / 'Modelfile'} has no TEMPLATE for Ollama: {made.missing}")
    for note in made.notes:
        job.display.say(f"Modelfile for Ollama: {note}")


def convert_and_quantize(
    fused: Path,
    out: Path,
    options: Options,
    llama: LlamaCpp,
    progress: Progress,
    meter: StageMeter,
    calibration: tuple[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """One bf16 conversion, then every type of --quant as `model-<type>.gguf`; yields a report of each as it is made.

    The vision tower of a multimodal model, where it can be converted, goes to MMPROJ at the end. calibration: text and
    its tokens for an importance matrix. The bf16 one, WHOLE, stays.
    """
    whole, name, quants = out / WHOLE, source_name(options.model), options.quant
    with meter.stage("convert", whole):
        convert(fused, whole, name, llama, lambda share, text: progress(share / 2, text))
    matrix = out / "imatrix.gguf" if calibration else None
    if calibration and matrix:
        with meter.stage("imatrix", matrix):
            make_imatrix(whole, *calibration, matrix, llama, progress)
    for number, quant in enumerate(quants):
        guided = matrix if quant not in UNGUIDED else None
        target = out / f"model-{quant}{'-imatrix' if guided else ''}.gguf"

        def part(share: float, text: str, number: int = number) -> None:
            progress(0.5 + (number + share) / len(quants) / 2, text)

        if target == whole:
            report = read_report(whole, quant)
        else:
            with meter.stage("quantize", target):
                report = quantize(whole, target, quant, llama, part, guided)
        file = str(target.relative_to(out.parent))
        yield {"name": target.stem.removeprefix("model-"), "file": file, **asdict(report)}
    if matrix:
        matrix.unlink()
    if ModelFolder(fused).has_vision and not vision_fault(fused):
        tower = out / MMPROJ
        with meter.stage("convert", tower):
            write_mmproj(fused, tower, name, llama, lambda share, text: progress(1.0, text))

"""The GGUFs of a run: converted, weighed, quantised, shown, tried; and the adapter alone as one."""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import run_record
from common.backend import Adapter, Progress
from common.data.load import data_of, encoder_of
from common.display import Display
from common.export.budget import Ledger
from common.export.fused_folder import Served
from common.export.modelfile import write_modelfile
from common.llama_cpp.convert import QuantReport, advice, convert, quantize
from common.llama_cpp.convert import report as read_report
from common.llama_cpp.imatrix import calibration_text, make_imatrix
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import write_gguf_lora
from common.llama_cpp.mmproj import has_vision, vision_fault, write_mmproj
from common.llama_cpp.server import Server
from common.model_files import names_code
from common.models.load import TEMPLATE
from common.options import UNGUIDED, Options, source_name

SAMPLE_TOKENS = 100
WHOLE = "model-BF16.gguf"  # what the others are quantised from, and proven against
MMPROJ = "mmproj-BF16.gguf"


def write_ggufs(
    run: Path,
    folder: Path,
    options: Options,
    llama: LlamaCpp,
    ledger: Ledger,
    display: Display,
    keep: Callable[..., None],
) -> None:
    """Make the GGUFs of the fused folder and show them. WHOLE is left beside them.

    folder: the base model's. keep: puts what is made on record, each file as soon as it is there.
    """
    text = _calibration(run, folder, options) if options.imatrix else None
    earlier = [r for r in run_record.read_run(run).get("export", {}).get("gguf", []) if (run / r["file"]).is_file()]
    reports: list[dict[str, Any]] = []

    def made(report: dict[str, Any]) -> None:
        reports.append(report)
        names = {report["name"] for report in reports}
        keep(gguf=[*reports, *(report for report in earlier if report.get("name") not in names)])

    with display.stage("gguf") as progress:
        name = source_name(options.model)
        convert_and_quantize(run / "fused", run / "gguf", name, options.quant, llama, progress, ledger, text, made)
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
        keep(mmproj=str(tower.relative_to(run)))
        display.say(f"its vision tower, for images: llama-server -m {run / reports[0]['file']} --mmproj {tower}")


def try_gguf(
    run: Path, report: dict[str, Any], served: Served, llama: LlamaCpp, display: Display
) -> dict[str, Any] | None:
    """What the GGUF of `report` answers to the run's sample prompt, shown, and its Modelfile; None without an answer.

    Neither can fail an export: a warning says what is missing.
    """
    known = run_record.read_run(run)
    gguf, prompt, sample = run / report["file"], known["sample_prompt"], None
    if prompt:
        # a run of an older version does not know its prompt's length; a token has at least a byte
        tokens = known.get("sample_tokens", len(json.dumps(prompt, ensure_ascii=False).encode()))
        with display.optional("no sample"), Server(llama, gguf, context=tokens + SAMPLE_TOKENS + _SPARE) as server:
            sample = {"prompt": prompt, "answer": server.chat(prompt, SAMPLE_TOKENS)}
            display.sample(f"llama.cpp, from {gguf.name}", str(prompt[-1]["content"]), sample["answer"])
    with display.optional("no Modelfile"):
        _write_modelfile(run, gguf, served, prompt, display)
    return sample


_SPARE = 64  # tokens that llama.cpp may prompt beyond what training counted, such as a second BOS


def write_lora(
    run: Path,
    folder: Path,
    final: Adapter,
    options: Options,
    llama: LlamaCpp,
    served: Served,
    ledger: Ledger,
    display: Display,
) -> str:
    """The adapter alone as a GGUF, and how to run it; its place in the run folder."""
    out = run / "gguf" / "adapter.gguf"
    with ledger.stage("lora", out), display.stage("lora-gguf"):
        write_gguf_lora(final, folder, out, llama)
    model = options.model or ""
    base = model if model.endswith(".gguf") else "BASE.gguf"
    command = [llama.server, "-m", base, "--lora", out]
    if served.template is not None:  # the base's own may prompt otherwise than training did
        command += ["--jinja", "--chat-template-file", run / TEMPLATE]
    display.say(f"run it over the base model's GGUF: {shlex.join(map(str, command))}")
    if base == "BASE.gguf" and names_code(folder):
        display.warn(f"{folder} holds or names code of its own, which llama.cpp's converter may run: see to that first")
    elif base == "BASE.gguf":
        command = ["python", llama.converter, folder, "--outfile", base]
        display.say(f"which is made by: {shlex.join(map(str, command))}")
    return str(out.relative_to(run))


def _calibration(run: Path, folder: Path, options: Options) -> tuple[str, int]:
    recipe = run_record.read_recipe(run)
    return calibration_text(data_of(run, options, recipe).train, encoder_of(folder, options, recipe))


def _write_modelfile(run: Path, gguf: Path, served: Served, prompt: list[dict[str, Any]], display: Display) -> None:
    made = write_modelfile(run / "fused", gguf, served.stops, run_record.read_recipe(run).thinking, prompt)
    if made.missing:
        display.warn(f"{gguf.parent / 'Modelfile'} has no TEMPLATE for Ollama: {made.missing}")
    for note in made.notes:
        display.say(f"Modelfile for Ollama: {note}")


def convert_and_quantize(
    fused: Path,
    out: Path,
    name: str,
    quants: list[str],
    llama: LlamaCpp,
    progress: Progress,
    ledger: Ledger,
    calibration: tuple[str, int] | None = None,
    made: Callable[[dict[str, Any]], None] = lambda report: None,
) -> None:
    """One bf16 conversion, then every type of `quants` as `model-<type>.gguf`; `made` gets a report of each at once.

    The vision tower of a multimodal model, where it can be converted, goes to MMPROJ. calibration: text and its tokens
    for an importance matrix. The bf16 one, WHOLE, stays.
    """
    whole = out / WHOLE
    with ledger.stage("convert", whole):
        convert(fused, whole, name, llama, lambda share, text: progress(share / 2, text))
    matrix = out / "imatrix.gguf" if calibration else None
    if calibration and matrix:
        with ledger.stage("imatrix", matrix):
            make_imatrix(whole, *calibration, matrix, llama, progress)
    for number, quant in enumerate(quants):
        guided = matrix if quant not in UNGUIDED else None
        target = out / f"model-{quant}{'-imatrix' if guided else ''}.gguf"

        def part(share: float, text: str, number: int = number) -> None:
            progress(0.5 + (number + share) / len(quants) / 2, text)

        if target == whole:
            report = read_report(whole, quant)
        else:
            with ledger.stage("quantise", target):
                report = quantize(whole, target, quant, llama, part, guided)
        made(
            {"name": target.stem.removeprefix("model-"), "file": str(target.relative_to(out.parent)), **asdict(report)}
        )
    if matrix:
        matrix.unlink()
    if has_vision(fused) and not vision_fault(fused):
        tower = out / MMPROJ
        with ledger.stage("convert", tower):
            write_mmproj(fused, tower, name, llama, lambda share, text: progress(1.0, text))

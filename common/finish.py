"""After training: fuse, export, try the GGUF, count the example; and `fuse RUN`, the same again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common import adapter as adapters
from common import models, record
from common.config import Options, Plan, Recipe
from common.dispatch import choose_backend, choose_device
from common.errors import UserError
from common.example import is_example, score
from common.export import Served, check_disk, disk_needed, try_gguf, write_fused, write_ggufs
from common.gguf import check_quants
from common.llamacpp import LlamaCpp
from common.lora import layer_count, validate
from common.mlx_quantized import source
from common.prepare import llama_for, source_name
from common.progress import Display, gigabytes
from common.record import timed
from common.seam import Adapter, Backend, ModelInfo, OutOfMemory

TEMPLATE = "chat_template.jinja"


def fuse_run(run: Path, options: dict[str, Any], make_backend: Callable[[str], Backend], display: Display) -> None:
    """`fuse RUN`: the fused folder and the GGUFs again, from the run's adapter."""
    known = record.read_run(run, "status", "options", "model_hash", "stop_ids", "sample_prompt")
    if known["status"] != "complete":
        raise UserError(f"{run} has not finished training.", f"Finish it: python cli.py train --resume {run}")
    if options.get("fuse_into") and known["options"].get("quantization", "none") == "none":
        raise UserError(
            f"--fuse-into {options['fuse_into']}: {run} had no --quantization: its base comes in one form only.",
            "Leave --fuse-into out.",
        )
    merged = Options.model_validate({**known["options"], **options})
    if merged.export == "none":  # how the run was started; who asks for a fusion wants the whole way
        merged = merged.model_copy(update={"export": "gguf"})
    check_quants(merged.quant)
    folder = models.resolve(merged.model or "", display.say)
    if models.content_hash(folder) != known["model_hash"]:
        raise UserError(f"{merged.model} is not the model that {run} was trained on.", "Bring that model back.")
    shapes = models.linear_shapes(folder, record.read_recipe(run).targets)
    final = adapters.read_trained(run, layer_count(shapes))
    validate(final, shapes, run / "adapter")
    check_disk(run, disk_needed(folder, merged.export, merged.quant, 0))
    llama = llama_for(merged, folder, display)
    template = run / TEMPLATE
    served = Served(known["stop_ids"], template.read_text(encoding="utf-8") if template.exists() else None)
    finish(run, folder, final, merged, llama, served, {}, display, make_backend)


def finish(
    run: Path,
    folder: Path,
    final: Adapter,
    options: Options,
    llama: LlamaCpp | None,
    served: Served,
    seconds: dict[str, float],
    display: Display,
    make_backend: Callable[[str], Backend],
) -> None:
    """Fuse, convert, quantise and, for the built-in example, count; recorded in run.json."""
    export: dict[str, Any] = {}
    if options.export != "none":
        replacing = _replaced(run, folder, final, options, make_backend, display)
        with timed(seconds, "fuse"), replacing as replaced, display.stage("fuse") as progress:
            write_fused(folder, final, run / "fused", served, progress, replaced)
        export["fused"] = "fused"
    if options.export == "gguf" and llama is not None:
        with display.stage("gguf") as progress:
            export["gguf"] = write_ggufs(
                run / "fused", run / "gguf", source_name(options.model), options.quant, llama, progress, seconds
            )
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
                for report in export["gguf"]
            ],
        )
        if any(report["fallbacks"] for report in export["gguf"]):
            display.say(
                "fallbacks: tensors whose rows are not divisible by 256 cannot take a K-quant; llama.cpp gave them a "
                "larger type, so the file is bigger than its name suggests."
            )
        first = run / export["gguf"][0]["file"]
        prompt = record.read_run(run)["sample_prompt"]
        with timed(seconds, "try"):
            answer = try_gguf(first, run / "fused", prompt, llama)
        export["sample"] = {"prompt": prompt, "answer": answer}
        if prompt:
            display.say(f"llama.cpp, from {first.name}: {prompt[-1]['content']!r} -> {answer!r}")
    export = record.read_run(run).get("export", {}) | export
    record.update_run(run, export=export)
    if options.export == "gguf" and llama is not None and is_example(options.data):
        with timed(seconds, "example"):
            counts = score(run, folder, options.quant[0], llama, display)
        record.update_run(run, example=counts)
    record_seconds(run, seconds)
    display.event("done", run=str(run), stage_seconds=seconds)
    if display.mode in ("rich", "plain"):
        _closing(record.read_run(run), seconds, display)
        display.say(f"The run is in {run}")


def _closing(run: dict[str, Any], seconds: dict[str, float], display: Display) -> None:
    """What it took, beside what was foretold."""
    whole = sum(seconds.values()) or 1.0
    figures = {"time": ", ".join(f"{name} {value:.1f} s ({value / whole:.0%})" for name, value in seconds.items())}
    if "train" in seconds:
        if run["tokens_per_second"]:  # of one step there is none
            speeds = run["tokens_per_second"], run["label_tokens_per_second"]
            figures["speed"] = f"{speeds[0]:.0f} tokens/s, {speeds[1]:.0f} of them labels"
        figures["memory"] = (
            f"peak {gigabytes(run['peak_memory_bytes'])}, foretold {gigabytes(run['predicted_peak_bytes'])} "
            f"({run['predicted_peak_bytes'] / max(1, run['peak_memory_bytes']) - 1:+.0%}); "
            f"the whole process {gigabytes(run['peak_rss_bytes'])}"
        )
        figures["padding"] = f"none in the layers' products, {run['padding_fraction']:.1%} of attention's positions"
    display.panel("Done", figures)


@contextmanager
def _replaced(
    run: Path,
    folder: Path,
    final: Adapter,
    options: Options,
    make_backend: Callable[[str], Backend],
    display: Display,
) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """What stands in for the 16-bit base's weights: nothing, or with --fuse-into dequantized those trained over."""
    recipe = record.read_recipe(run)
    if recipe.quantization == "none":
        yield {}
    elif source(folder) is not None:
        display.say(f"The adapter goes into the model's dequantised {recipe.quantization} weights: it has no others.")
        yield {}
    elif options.fuse_into != "dequantized":
        display.say(
            f"The adapter goes into the 16-bit base, which is better than the {recipe.quantization} one it was trained "
            "over, but not the same; --fuse-into dequantized gives what training saw."
        )
        yield {}
    else:
        display.say(f"The adapter goes into the dequantised {recipe.quantization} weights that it was trained over.")
        plan = record.read_plan(run)
        if (plan.backend == "mlx") != recipe.quantization.startswith("mlx"):
            raise UserError(f"{run}: plan.yaml says {plan.backend}, its base is {recipe.quantization}.", "Undo that.")
        choose_backend(plan.backend)  # a run may have come from another machine
        device = choose_device("auto", plan.backend).value
        backend, _ = loaded(make_backend, recipe, plan.model_copy(update={"device": device}), folder, final)
        try:
            yield backend.dequantized()
        finally:
            backend.close()


def record_seconds(run: Path, seconds: dict[str, float]) -> None:
    """Into run.json: the training of a run's processes adds up, of any other stage the last time counts."""
    earlier = record.read_run(run).get("stage_seconds", {})
    for stage in {"train", "evaluate", "save"} & seconds.keys():
        seconds[stage] += earlier.get(stage, 0.0)
    record.update_run(run, stage_seconds=earlier | seconds)


def loaded(
    make_backend: Callable[[str], Backend], recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None
) -> tuple[Backend, ModelInfo]:
    backend = make_backend(plan.backend)
    try:
        return backend, backend.load(recipe, plan, folder, adapter)
    except OutOfMemory as error:
        raise UserError(
            f"{recipe.model} does not fit into memory on {plan.device}: {error}",
            "Close other programs, train a smaller model, or hold the base in fewer bits with --quantization 4bit.",
        ) from None

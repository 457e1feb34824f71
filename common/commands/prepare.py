"""Everything that is settled before the first step: what could go wrong later is looked at here."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.backend import Adapter
from common.data.batching import steps_per_epoch
from common.data.dataset import Example, data_hash, prompt_of, said
from common.data.encode import Encoded, Encoder, Style, exported_template, load_tokenizer, stop_ids, template_hash
from common.data.load import check_fields, load_data
from common.data.quality import doubtful
from common.data.truncation import Fitted, encode_all, fit
from common.display import Display, gigabytes
from common.errors import UserError
from common.export.budget import THROUGH, Stage, check_disk, foretell, warn_of_memory
from common.export.fused_folder import Served, checkpoints_disk, trained_bytes
from common.export.mlx import check_installed
from common.export.preflight import reloaded, tools_for
from common.export.upload import check_push
from common.llama_cpp.convert import check_quants
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.lora import check_lora
from common.models.adapter_files import adapter_hash, read_any
from common.models.families import text_config
from common.models.lora_init import choose_layers, initial_adapter, layer_count, validate
from common.models.mlx_quantized import source
from common.models.resolve import content_hash, resolve, stored_type
from common.models.shapes import linear_shapes, target_names
from common.options import Options, source_name
from common.recipe import Plan, Recipe
from common.run_record import LOCK
from common.system.hardware import (
    INSTALL,
    Choice,
    choose_backend,
    choose_device,
    choose_precision,
    preload,
    quantization_scheme,
)
from common.training.metrics import timed
from common.training.planner import Chosen, choose


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first step."""

    options: Options
    run: Path
    folder: Path  # the base model in 16 or 32 bits
    trained_over: Path  # what the backend loads: the same, or a ready-made quantised one
    recipe: Recipe
    chosen: Chosen
    config: dict[str, Any]  # the language model's, normalised
    choices: dict[str, Choice]
    train: list[Encoded]
    valid: list[Encoded]
    start: Adapter | None  # None: every weight is trained
    llama: LlamaCpp | None
    served: Served
    sample: list[dict[str, Any]]  # a prompt to try the result with; of plain text there is none
    sample_tokens: int  # of the row that the prompt is from

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


def prepare(options: Options, resumed: Path | None, display: Display, seconds: dict[str, float] | None = None) -> Job:
    """Everything that could go wrong later is looked at here, cheapest first. `seconds`: of tokenising is told."""
    seconds = {} if seconds is None else seconds
    check_quants(options.quant)
    if options.push:
        check_push(options.push, not options.push_public, display)
    if not options.model:
        raise UserError("No model is given.", "Add --model NAME (a hub name, a folder or a GGUF file).")
    if not options.data:
        raise UserError("No data is given.", "Add --data FILE.jsonl (or a folder with train.jsonl).")
    if "lora" in THROUGH[options.export]:
        check_lora(options.method)
    if "mlx" in THROUGH[options.export]:
        check_installed()
    choices = {"backend": choose_backend(options.backend)}
    backend = choices["backend"].value
    choices["device"] = choose_device(options.device, backend)
    if backend == "mlx" and choices["device"].value == "cpu" and not preload():
        display.warn(f"MLX will be about 15 times slower than need be: no OpenBLAS was found. {INSTALL}")
    choices["precision"] = choose_precision(options.precision, backend, choices["device"].value)
    if options.method == "full" and options.precision == "auto":
        choices["precision"] = Choice("fp32", "every weight is trained: in bf16 small updates would be lost")
    scheme = quantization_scheme(options.quantization, backend)
    if options.method == "dora" and scheme == "int8":
        raise UserError(
            "--method dora over bitsandbytes' int8 base: bitsandbytes cannot give the rows' lengths on every device.",
            "Use --quantization 4bit, or --method lora.",
        )
    run = resumed or _output(options, backend)
    check_fields(options.field)
    data = load_data(options.data, options.valid_share, options.seed, options.field)
    display.say(f"{options.data} read as: {data.described()}")
    for finding in doubtful(data):
        display.warn(str(finding))
    if options.valid_share and not data.valid and not Path(options.data).expanduser().is_dir():
        display.warn("nothing could be held out for validation: all rows have the same prompt")
    folder = resolve(options.model, display.say)
    trained_over, scheme = _ready_made(options, folder, backend, scheme, display)
    shapes = linear_shapes(folder, options.targets)
    given = _given_adapter(options, folder) if options.adapter else None
    tokenizer = load_tokenizer(folder, options.chat_template)
    style = Style(options.train_on, options.thinking)
    with timed(seconds, "tokenise"), display.stage("read the data") as progress:
        encoder = Encoder(tokenizer, style)
        every, valid_every = encode_all(data.train, encoder, progress), encode_all(data.valid, encoder)
    for note, count in Counter(note for row in [*every, *valid_every] for note in row.notes).items():
        display.say(f"{count} rows: {note}")
    fitted, valid_fitted = (fit(part, options.max_length, options.overflow) for part in (every, valid_every))
    rows, valid = fitted.rows, valid_fitted.rows
    if unlabelled := fitted.unlabelled + valid_fitted.unlabelled:
        display.warn(f"{len(unlabelled)} rows are left out, nothing in them is trained: {unlabelled[0].source} ...")
    if len(fitted.unlabelled) == len(every):
        raise UserError(
            f"--train-on {options.train_on}: nothing in {options.data} is trained.",
            "Look at it with check-data --explain 1; train: false and weight: 0 take turns out.",
        )
    if data.valid and not valid:
        display.warn("no validation row is left, so the last adapter is exported, not the best")
    if not rows:
        raise UserError(
            f"--max-length {options.max_length}: every row of {options.data} is longer "
            f"(the shortest has {min(len(row.ids) for row in every)} tokens).",
            "Raise --max-length.",
        )
    for what, long in (
        ("dropped", fitted.dropped + valid_fitted.dropped),
        ("truncated", fitted.truncated + valid_fitted.truncated),
    ):
        if long:
            shown = ", ".join(f"{row.source} ({len(row.ids)})" for row in long[:5])
            more = f" and {len(long) - 5} more" if len(long) > 5 else ""
            display.warn(
                f"{len(long)} rows longer than --max-length {options.max_length} are {what}: {shown}{more} "
                "(check-data lists them all)"
            )
    with display.stage("hash the model") as progress:
        model_hash = content_hash(folder, progress)
    per_epoch = steps_per_epoch(len(rows), options.batch_size)
    steps = options.steps or math.ceil((options.epochs or 3) * per_epoch)
    warmup = round(options.warmup * steps) if options.warmup < 1 else min(int(options.warmup), steps)
    same = set(Recipe.model_fields) & set(Options.model_fields) - _RESOLVED
    recipe = Recipe(
        **{name: getattr(options, name) for name in same} | _shape_of(given),
        model=options.model,
        data=options.data,
        model_hash=model_hash,
        data_hash=data_hash(data),
        template_hash=template_hash(tokenizer),
        precision=choices["precision"].value,  # type: ignore[arg-type]  # pydantic checks it
        targets=target_names(shapes if given is None else dict.fromkeys(given.weights, (0, 0))),
        adapter_hash=adapter_hash(given) if given else "",
        quantization=scheme,
        steps=steps,
        warmup_steps=warmup,
        eval_every=options.eval_every or per_epoch,
    )
    plan = Plan(
        backend=backend,  # type: ignore[arg-type]  # pydantic checks it
        device=choices["device"].value,  # type: ignore[arg-type]
        micro_batch_tokens=1,  # chosen below
        on_swap=options.on_swap,
        save_every=options.save_every or per_epoch,
        save_minutes=options.save_minutes,
    )
    start = _start(recipe, shapes, given)
    config = text_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config["dtype"] = stored_type(folder)
    chosen = choose(options, recipe, plan, config, start, rows)
    if chosen.prediction.peak > chosen.budget:
        display.warn(
            f"training needs about {gigabytes(chosen.prediction.peak)}, and {gigabytes(chosen.budget)} may be taken "
            f"({chosen.why}): it may swap, or fail. Close other programs, lower --max-length or use --quantization 4bit"
        )
    adapter_bytes = trained_bytes(start, folder)
    held = reloaded(options, recipe, config, folder)
    after = foretell(options.export, options.quant, folder, adapter_bytes, held, options.imatrix, not options.no_verify)
    check_disk(run, [Stage("checkpoints", 0, checkpoints_disk(adapter_bytes)), *after])
    warn_of_memory(after, display)
    llama = tools_for(options, recipe.method, folder, display, tokenizer, said(data.train, 200_000))
    sample = _sample_prompt((data.valid, valid_fitted), (data.train, fitted))
    chats = any(row.text is None for row in data.train)  # plain text says nothing of how to be prompted
    served = Served(stop_ids(every), exported_template(tokenizer, style) if chats else None)
    return Job(
        options, run, folder, trained_over, recipe, chosen, config, choices, rows, valid, start, llama, served, *sample
    )


def _sample_prompt(*parts: tuple[list[Example], Fitted]) -> tuple[list[dict[str, Any]], int]:
    """`(the prompt of the first chat row that was kept complete, the tokens of that row)`; `([], 0)` without one."""
    for examples, fitted in parts:
        by_source = {example.source: example for example in examples}
        cut = {row.source for row in fitted.truncated}
        for row in fitted.rows:
            if row.source not in cut and by_source[row.source].text is None:
                return prompt_of(by_source[row.source]), len(row.ids)
    return [], 0


# What the recipe holds in another form than the options.
_RESOLVED = {"model", "data", "targets", "precision", "quantization", "steps", "eval_every"}


def _ready_made(options: Options, folder: Path, backend: str, scheme: str, display: Display) -> tuple[Path, str]:
    """`(what the backend loads, the scheme)`: MLX's own quantised weights where the model has come in them."""
    if (found := source(folder)) is None:
        return folder, scheme
    ready, known = found
    if options.method == "full":
        raise UserError(f"--method full: {options.model} is quantised ({known}).", "Give the 16-bit model.")
    if options.fuse_into == "base":
        raise UserError(f"--fuse-into base: {options.model} has no 16-bit weights.", "Leave --fuse-into out.")
    if backend != "mlx":
        display.warn(f"{options.model} is quantised by MLX ({known}); torch trains over its weights in 16 bits")
        return folder, scheme
    if options.quantization not in ("none", known.split("-")[1]):
        raise UserError(f"--quantization {options.quantization}: the model is {known} already.", "Leave it out.")
    return ready, known


def _start(recipe: Recipe, shapes: dict[str, tuple[int, int]], given: Adapter | None) -> Adapter | None:
    if recipe.method == "full":
        return None
    if given is not None:
        return replace(given, base_model=recipe.model, dropout=recipe.dropout)
    return initial_adapter(choose_layers(shapes, recipe.layers), layer_count(shapes), recipe)


def _given_adapter(options: Options, folder: Path) -> Adapter:
    """--adapter, checked against the base model. Raises UserError where it is another model's."""
    every = linear_shapes(folder, ["all-linear"])
    adapter = read_any(Path(options.adapter or "").expanduser(), layer_count(every))
    validate(adapter, every, Path(options.adapter or ""))
    return adapter


def _shape_of(given: Adapter | None) -> dict[str, Any]:
    """What --adapter settles of the recipe; the most common rank and alpha stand for all: its hash tells the rest."""
    if given is None:
        return {}
    (rank, alpha), _ = Counter((w.rank, w.alpha) for w in given.weights.values()).most_common(1)[0]
    return {
        "rank": rank,
        "alpha": alpha,
        "rslora": next(iter(given.weights.values())).rslora,
        "method": "dora" if given.dora else "lora",
    }


def _output(options: Options, backend: str) -> Path:
    if options.output:
        run = Path(options.output)
        check_unused(run)
        if run.exists() and (not run.is_dir() or any(path.name != LOCK for path in run.iterdir())):
            raise UserError(f"--output {run} is not an empty folder.", "Give a new or an empty folder.")
        return run
    return free_name(Path("runs") / f"{source_name(options.model)}-{source_name(options.data)}-{backend}")


def check_unused(run: Path) -> None:
    """Raises UserError where the folder holds a run."""
    if (run / "run.json").exists():
        raise UserError(
            f"--output {run} holds another run.",
            f"Go on with it (python cli.py train --resume {run}), or give another folder.",
        )


def free_name(run: Path) -> Path:
    """`run`, or the first of `run-2`, `run-3` ... that is not there."""
    name, number = run.name, 1
    while run.exists():
        number += 1
        run = run.with_name(f"{name}-{number}")
    return run

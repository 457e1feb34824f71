"""The main job in its order: check everything, train, fuse, export, measure."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import adapter as adapters
from common import checkpoint, models, record
from common.batches import steps_per_epoch
from common.blas import INSTALL, preload
from common.checkpoint import State
from common.config import Options, Plan, Recipe, write_yaml
from common.data import data_hash, load_data, prompt_of
from common.dispatch import Choice, choose_backend, choose_device, choose_precision
from common.errors import UserError
from common.example import is_example, score
from common.export import check_disk, disk_needed, try_gguf, write_fused, write_ggufs
from common.gguf import check_convertible, check_quants
from common.llamacpp import LlamaCpp, ensure, find, missing_build_tools
from common.loop import Interrupted, train
from common.memory import ResidentSet, swap_used
from common.progress import Display
from common.seam import Adapter, Backend, Memory, ModelInfo, OutOfMemory
from common.template import Encoded, encode_all, load_tokenizer, stop_ids, template_hash


@dataclass(frozen=True)
class Job:
    """Everything that is known before the first step."""

    options: Options
    run: Path
    folder: Path  # the base model
    recipe: Recipe
    plan: Plan
    choices: dict[str, Choice]
    train: list[Encoded]
    valid: list[Encoded]
    shapes: dict[str, tuple[int, int]]
    llama: LlamaCpp | None
    stops: list[int]
    sample: list[dict[str, str]]  # a prompt to try the result with


def run_training(options: Options, make_backend: Callable[[str], Backend], display: Display) -> Path:
    """The whole of `train`. Raises UserError, or Interrupted after a saved stop. Returns the run folder."""
    resumed = None
    if options.resume:
        resumed = Path(options.resume)
        options = _resumed_options(options, resumed)
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        job = prepare(options, resumed, display)
    job, state = _open_run(job, resumed)
    with _only_one(job.run):
        try:
            with _timed(seconds, "train"):
                final = _train(job, state, make_backend, display)
        except BaseException as error:
            record.update_run(job.run, status="interrupted", stage_seconds=seconds)
            if not isinstance(error, (Interrupted, UserError)):
                display.warn(f"training was stopped. To go on: python cli.py train --resume {job.run}")
            raise
        adapters.validate(final, job.shapes, job.run)
        adapters.write_both(job.run, final)
        record.update_run(job.run, status="complete")
        try:
            finish(job.run, job.folder, final, job.options, job.llama, job.stops, seconds, display)
        except BaseException:
            display.warn(f"training is complete and kept. To export it: python cli.py fuse {job.run}")
            raise
    return job.run


def fuse_run(run: Path, options: dict[str, Any], display: Display) -> None:
    """`fuse RUN`: the fused folder and the GGUFs again, from the run's adapter."""
    known = record.read_run(run, "status", "options", "model_hash", "stop_ids", "sample_prompt")
    if known["status"] != "complete":
        raise UserError(f"{run} has not finished training.", f"Finish it: python cli.py train --resume {run}")
    merged = Options.model_validate({**known["options"], **options})
    if merged.export == "none":  # how the run was started; who asks for a fusion wants the whole way
        merged = merged.model_copy(update={"export": "gguf"})
    check_quants(merged.quant)
    folder = models.resolve(merged.model or "", display.say)
    if models.content_hash(folder) != known["model_hash"]:
        raise UserError(f"{merged.model} is not the model that {run} was trained on.", "Bring that model back.")
    final = adapters.read_peft(run / "adapter")
    adapters.validate(final, models.linear_shapes(folder, merged.target_names()), run / "adapter")
    check_disk(run, disk_needed(folder, merged.export, merged.quant, 0))
    llama = _llama(merged, folder, display)
    finish(run, folder, final, merged, llama, known["stop_ids"], {}, display)


def prepare(options: Options, resumed: Path | None, display: Display) -> Job:
    """Everything that could go wrong later is looked at here, cheapest first."""
    check_quants(options.quant)
    if not options.model:
        raise UserError("No model is given.", "Add --model NAME (a hub name, a folder or a GGUF file).")
    if not options.data:
        raise UserError("No data is given.", "Add --data FILE.jsonl (or a folder with train.jsonl).")
    choices = {"backend": choose_backend(options.backend)}
    backend = choices["backend"].value
    choices["device"] = choose_device(options.device, backend)
    if backend == "mlx" and choices["device"].value == "cpu" and not preload():
        display.warn(f"MLX will be about 15 times slower than need be: no OpenBLAS was found. {INSTALL}")
    choices["precision"] = choose_precision(options.precision, backend, choices["device"].value)
    run = resumed or _output(options, backend)
    data = load_data(Path(options.data), options.valid_share, options.seed)
    folder = models.resolve(options.model, display.say)
    shapes = models.linear_shapes(folder, options.target_names())
    tokenizer = load_tokenizer(folder)
    with display.stage("read the data") as progress:
        rows, too_long = encode_all(data.train, tokenizer, options.max_length, progress)
        valid, valid_too_long = encode_all(data.valid, tokenizer, options.max_length)
    if not rows:
        raise UserError(
            f"--max-length {options.max_length}: every row of {options.data} is longer "
            f"(the shortest has {min(len(row.ids) for row in too_long)} tokens).",
            "Raise --max-length.",
        )
    if dropped := too_long + valid_too_long:
        shown = ", ".join(f"{row.source} ({len(row.ids)})" for row in dropped[:5])
        more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
        display.warn(
            f"{len(dropped)} rows longer than --max-length {options.max_length} are dropped: {shown}{more} "
            "(check-data lists them all)"
        )
    adapter_bytes = sum(4 * options.rank * (out + into) for out, into in shapes.values())
    check_disk(run, disk_needed(folder, options.export, options.quant, adapter_bytes))
    llama = _llama(options, folder, display)
    with display.stage("hash the model") as progress:
        model_hash = models.content_hash(folder, progress)
    per_epoch = steps_per_epoch(len(rows), options.batch_size)
    steps = options.steps or math.ceil((options.epochs or 3) * per_epoch)
    warmup = round(options.warmup * steps) if options.warmup < 1 else min(int(options.warmup), steps)
    same = set(Recipe.model_fields) & set(Options.model_fields) - {"model", "data", "targets", "precision", "steps"}
    recipe = Recipe(
        **{name: getattr(options, name) for name in same - {"eval_every"}},
        model=options.model,
        data=options.data,
        model_hash=model_hash,
        data_hash=data_hash(data),
        template_hash=template_hash(tokenizer),
        precision=choices["precision"].value,  # type: ignore[arg-type]  # pydantic checks it
        targets=options.target_names(),
        steps=steps,
        warmup_steps=warmup,
        eval_every=options.eval_every or per_epoch,
    )
    plan = Plan(
        backend=backend,  # type: ignore[arg-type]  # pydantic checks it
        device=choices["device"].value,  # type: ignore[arg-type]
        micro_batch_tokens=options.micro_batch_tokens,
        save_every=options.save_every or per_epoch,
    )
    sample = prompt_of((data.valid or data.train)[0])
    return Job(options, run, folder, recipe, plan, choices, rows, valid, shapes, llama, stop_ids(rows), sample)


def finish(
    run: Path,
    folder: Path,
    final: Adapter,
    options: Options,
    llama: LlamaCpp | None,
    stops: list[int],
    seconds: dict[str, float],
    display: Display,
) -> None:
    """Fuse, convert, quantise and, for the built-in example, count; recorded in run.json."""
    export: dict[str, Any] = {}
    if options.export != "none":
        with _timed(seconds, "fuse"), display.stage("fuse") as progress:
            write_fused(folder, final, run / "fused", stops, progress)
        export["fused"] = "fused"
    if options.export == "gguf" and llama is not None:
        with _timed(seconds, "gguf"), display.stage("gguf") as progress:
            export["gguf"] = write_ggufs(
                run / "fused", run / "gguf", _name(options.model), options.quant, llama, progress
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
        with _timed(seconds, "try"):
            answer = try_gguf(first, run / "fused", prompt, llama)
        export["sample"] = {"prompt": prompt, "answer": answer}
        display.say(f"llama.cpp, from {first.name}: {prompt[-1]['content']!r} -> {answer!r}")
    export = record.read_run(run).get("export", {}) | export
    record.update_run(run, export=export)
    if options.export == "gguf" and llama is not None and is_example(options.data):
        with _timed(seconds, "example"):
            counts = score(run, folder, options.quant[0], llama, display)
        record.update_run(run, example=counts)
    earlier = record.read_run(run).get("stage_seconds", {})  # a resumed run's training adds up, the rest is the last
    if "train" in seconds:
        seconds["train"] += earlier.get("train", 0.0)
    record.update_run(run, stage_seconds=earlier | seconds)
    display.event("done", run=str(run), stage_seconds=seconds)
    if display.mode in ("rich", "plain"):
        display.say("stages: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
        display.say(f"The run is in {run}")


def _train(job: Job, state: State, make_backend: Callable[[str], Backend], display: Display) -> Adapter:
    """The loop with its backend loaded around it. Returns the adapter to export."""
    recipe, resident, swap = job.recipe, ResidentSet(), swap_used()
    with display.stage("load the model"):
        backend = make_backend(job.plan.backend)
        try:
            info = backend.load(recipe, job.plan, job.folder, list(job.shapes))
        except OutOfMemory as error:
            raise UserError(
                f"{recipe.model} does not fit into memory on {job.plan.device}: {error}",
                "Close other programs, or train a smaller model.",
            ) from None
    _header(job, info, display)
    found = checkpoint.latest(job.run) if state.step else None
    if found:
        backend.set_adapter(found[1])
        backend.set_optimizer(found[2])
    else:
        start = adapters.initial_adapter(
            job.shapes, recipe.model, recipe.rank, recipe.alpha, recipe.dropout, recipe.seed
        )
        backend.set_adapter(start)
    with _stop_signal() as stop, display.training(recipe.steps, state.step):
        watch = _Watch(display, stop)
        try:
            train(backend, recipe, job.plan, job.train, job.valid, job.run, state, watch)
        finally:
            memory, before = (
                backend.memory(),
                record.read_run(job.run),
            )  # a resumed run's peaks are of all its processes
            record.update_run(
                job.run,
                **record.figures(state, recipe, job.plan),
                memory_kind=memory.kind,
                peak_memory_bytes=max(memory.peak, before.get("peak_memory_bytes", 0)),
                peak_rss_bytes=max(resident.process_peak(), before.get("peak_rss_bytes", 0)),
                swap_growth_bytes=max(swap_used() - swap, before.get("swap_growth_bytes", 0)),
            )
    last = backend.get_adapter()
    backend.close()
    exported = "best" if state.best is not None else "last"
    step = state.best_step if state.best is not None else state.step
    record.update_run(job.run, exported_adapter=exported, exported_step=step)
    display.say(f"The adapter of step {step} ({exported}) is the one that is exported")
    return state.best or last


class _Watch:
    """The loop's Observer: the display, and whether Ctrl-C was pressed."""

    def __init__(self, display: Display, stop: list[int]) -> None:
        self._display, self._stop = display, stop

    def step(self, line: dict, memory: Memory) -> None:
        self._display.step(line, memory)

    def evaluation(self, line: dict) -> None:
        self._display.evaluation(line)

    def warn(self, text: str) -> None:
        self._display.warn(text)

    def stop_requested(self) -> bool:
        return bool(self._stop)


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """The first Ctrl-C (or SIGTERM) is noted, so that the step ends and is saved; the second acts at once."""
    stop: list[int] = []

    def note(number: int, frame: object) -> None:
        stop.append(number)
        if len(stop) > 1:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _header(job: Job, info: ModelInfo, display: Display) -> None:
    recipe, plan = job.recipe, job.plan
    choice = job.choices
    epochs = recipe.steps / steps_per_epoch(len(job.train), recipe.batch_size)
    display.panel(
        "Twintune",
        {
            "model": f"{recipe.model} ({info.architecture}, {info.layers} layers)",
            "backend": f"{plan.backend}: {choice['backend'].why}",
            "device": f"{plan.device}: {choice['device'].why}",
            "precision": f"{recipe.precision}: {choice['precision'].why}",
            "data": f"{recipe.data}: {len(job.train)} train, {len(job.valid)} valid rows",
            "recipe": f"{recipe.hash()[:12]}: {recipe.steps} steps of {recipe.batch_size} rows ({epochs:.2f} epochs), "
            f"learning rate {recipe.learning_rate:g} {recipe.schedule}, {recipe.warmup_steps} warm-up steps",
            "adapter": f"rank {recipe.rank}, alpha {recipe.alpha:g} on {len(job.shapes)} layers: "
            f"{info.trainable:,} of {info.total:,} parameters are trained ({info.trainable / info.total:.2%})",
            "plan": f"micro-batches of up to {plan.micro_batch_tokens} padded tokens, "
            f"a checkpoint every {plan.save_every} steps",
            "run": str(job.run),
        },
    )


@contextmanager
def _only_one(run: Path) -> Iterator[None]:
    """Hold the run folder: a second process that goes on with it would mix its steps into ours."""
    from filelock import FileLock, Timeout

    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run} is being trained by another process.", "Wait for it, or stop it first.") from None
    try:
        yield
    finally:
        lock.release()
        (run / ".lock").unlink(missing_ok=True)


def _open_run(job: Job, resumed: Path | None) -> tuple[Job, State]:
    """The job with its folder made, and where it stands."""
    if resumed:
        recorded = record.read_run(resumed)["recipe_hash"]
        if recorded != job.recipe.hash():
            raise UserError(
                f"{resumed}: its model or data have changed since it began (recipe {recorded[:12]} then, "
                f"{job.recipe.hash()[:12]} now).",
                "Bring the old files back, or start a new run.",
            )
        found = checkpoint.latest(resumed)
        record.update_run(resumed, status="training")
        return job, found[0] if found else State(micro_batch_tokens=job.plan.micro_batch_tokens)
    while True:
        try:
            job.run.mkdir(parents=True, exist_ok=bool(job.options.output))
            break
        except FileExistsError:  # another run took the name while this one prepared
            job = replace(job, run=_free(job.run))
    write_yaml(job.run / "recipe.yaml", job.recipe, f"recipe {job.recipe.hash()}")
    write_yaml(job.run / "plan.yaml", job.plan, "what changes only speed and memory")
    record.write_environment(job.run)
    record.update_run(
        job.run,
        status="training",
        recipe_hash=job.recipe.hash(),
        model_hash=job.recipe.model_hash,
        stop_ids=job.stops,
        sample_prompt=job.sample,
        options=_anchored(job.options.model_dump(by_alias=True, exclude={"resume", "config"})),
    )
    return job, State(micro_batch_tokens=job.plan.micro_batch_tokens)


def _anchored(options: dict[str, Any]) -> dict[str, Any]:
    """Paths made absolute, so that the run can be resumed from another working folder."""
    for key in ("model", "data", "llama_cpp"):
        if options[key] and Path(options[key]).expanduser().exists():
            options[key] = str(Path(options[key]).expanduser().resolve())
    return options


def _resumed_options(options: Options, run: Path) -> Options:
    known = record.read_run(run, "options", "recipe_hash")
    plan, recipe = record.read_plan(run), record.read_recipe(run)
    given = options.model_dump(by_alias=True, exclude_unset=True)
    merged = known["options"] | given
    # what was `auto` then stays what it became
    merged |= {"backend": plan.backend, "device": plan.device, "precision": recipe.precision}
    return Options.model_validate(merged)


def _output(options: Options, backend: str) -> Path:
    if options.output:
        run = Path(options.output)
        if (run / "run.json").exists():
            raise UserError(
                f"--output {run} holds another run.",
                f"Go on with it (python cli.py train --resume {run}), or give another folder.",
            )
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"--output {run} is not an empty folder.", "Give a new or an empty folder.")
        return run
    return _free(Path("runs") / f"{_name(options.model)}-{_name(options.data)}-{backend}")


def _free(run: Path) -> Path:
    """`run`, or the first of `run-2`, `run-3` ... that is not there."""
    name, number = run.name, 1
    while run.exists():
        number += 1
        run = run.with_name(f"{name}-{number}")
    return run


def _name(source: str | None) -> str:
    name = Path(source or "").name
    return name.removesuffix(".gguf").removesuffix(".jsonl")


def _llama(options: Options, folder: Path, display: Display) -> LlamaCpp | None:
    """llama.cpp, found or built now: not after hours of training. None where no GGUF is wanted."""
    if options.export != "gguf":
        return None
    check_convertible(folder)
    llama = find(options.llama_cpp)
    if llama is None:
        if missing := missing_build_tools():
            raise UserError(
                "llama.cpp makes the GGUF; none was found, and it cannot be built here:\n" + "\n".join(missing),
                "Install that, name a build with --llama-cpp DIR, or stop earlier with --export fused.",
            )
        with display.stage("build llama.cpp, once") as progress:
            llama = ensure(options.llama_cpp, progress)
    display.say(f"llama.cpp: {llama.where}")
    return llama


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

"""The models that are judged side by side: a run's base, adapter, fused folder and GGUFs, or one model alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from common.backend import Adapter, Backend
from common.context import Context
from common.data.encode import Encoded
from common.errors import UserError
from common.evaluation.losses import Loss, backend_loss, gguf_loss
from common.inference.backend_chat import ChatFormat, ChatModel, backend_chat_model
from common.inference.chat_models import Kind, Target, choose, opened, untrained
from common.llama_cpp.build import own
from common.llama_cpp.logits import GgufLogits
from common.models.load import adapter_of, loaded, runnable
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder, is_model_folder
from common.recipe import Plan, Recipe
from common.run_record import Run
from common.system.hardware import choose_backend

KINDS: tuple[Kind, ...] = ("base", "adapter", "fused", "gguf")
LossOf = Callable[[Encoded], Loss]


@dataclass(frozen=True)
class Opened:
    """A model that is judged. Losses are taken and left before answers are asked for: a GGUF has a program for each."""

    losses: Callable[[int], AbstractContextManager[LossOf]]  # of rows of at most so many tokens
    answers: Callable[[], AbstractContextManager[ChatModel]]


@dataclass(frozen=True)
class Subject:
    name: str
    identity: list[Any]  # what its losses and answers depend on
    open: Callable[[], AbstractContextManager[Opened]]  # loads the model
    slots: int = 1  # answers made at once
    has_loss: bool = True  # not a GGUF without a run: nothing says how rows become tokens


@dataclass(frozen=True)
class Lengths:
    """context: tokens of a prompt and its answer. slots: answers that llama.cpp makes at once."""

    context: int
    slots: int


def subjects_of(
    run: Run, base: ModelFolder, targets: Sequence[Target], lengths: Lengths, context: Context
) -> list[Subject]:
    """A subject for each target of the run."""
    found = []
    for target in targets:
        if target.kind == "gguf":
            found.append(gguf_subject(target, lengths, context))
            continue
        recipe, template = run.recipe, run.read_template()
        files = {
            "base": [],
            "adapter": [run.adapter / "adapter_model.safetensors"],
            "fused": ModelFolder(run.path / str(run.record.export.fused)).shards if target.kind == "fused" else [],
        }
        identity: list[Any] = [
            target.kind,
            run.record.model_hash,
            recipe.precision,
            recipe.quantization,
            recipe.thinking,
        ]
        identity += [template, run.record.stop_ids, [_stamp(file) for file in files[target.kind]]]
        form = ChatFormat(base.path, template, run.record.stop_ids, recipe.thinking == "keep", lengths.context)
        load = partial(_load_of_run, run, target.kind, base, context)
        opener = partial(_in_backend, load, form, target.kind == "adapter")
        found.append(Subject(target.kind, identity, opener))
    return found


def targets_of(run: Run, kinds: Sequence[Kind] | None, quants: Sequence[str] | None) -> list[Target]:
    """What of the run is judged: these kinds, or all that it has; of its GGUFs those of `quants`, or all.

    Raises UserError where something that is named is missing.
    """
    record = run.require_complete()
    names = [gguf.name for gguf in record.export.gguf if run.has_gguf(gguf)]
    there = {
        "base": True,
        "adapter": record.options.get("method") != "full",
        "fused": bool(record.export.fused) and is_model_folder(run.path / str(record.export.fused)),
        "gguf": bool(names),
    }
    if quants and kinds and "gguf" not in kinds:
        raise UserError(f"--quant {' '.join(quants)}: --with names no GGUF.", "Leave one of them out.")
    chosen = [kind for kind in KINDS if (kind in kinds if kinds else there[kind])]
    if quants and "gguf" not in chosen:
        chosen.append("gguf")
    found = [choose(run.path, kind, None) for kind in chosen if kind != "gguf"]
    if "gguf" in chosen:
        wanted: Sequence[str | None] = quants or names or [None]
        found += [choose(run.path, "gguf", quant) for quant in wanted]
    return found


def gguf_subject(target: Target, lengths: Lengths, context: Context) -> Subject:
    """A GGUF in llama.cpp."""

    @contextmanager
    def answers() -> Iterator[ChatModel]:
        with opened(target, context, lengths.context, lengths.slots) as models:
            yield models.tuned

    @contextmanager
    def losses(longest: int) -> Iterator[LossOf]:
        with context.display.stage("find or build llama.cpp") as progress:
            tool = cast(Path, own(progress).logits)
        with GgufLogits(tool, target.path, longest) as model:
            yield partial(gguf_loss, model)

    name = target.path.stem.removeprefix("model-")
    identity = ["gguf", _stamp(target.path)]
    return Subject(name, identity, lambda: nullcontext(Opened(losses, answers)), lengths.slots, target.run is not None)


def model_subject(name: str, model: ModelFolder, template: str | None, lengths: Lengths, context: Context) -> Subject:
    """A model that belongs to no run, in the backend that this machine trains with. template: in place of its own."""
    backend = choose_backend("auto", context.backends).value
    package = context.backends(backend)
    device = package.choose_device("auto").value
    plan = Plan(backend=backend, device="cpu", micro_batch_tokens=1, save_every=1).on(device)  # type: ignore[arg-type]
    unknown = dict.fromkeys(("data", "model_hash", "data_hash", "template_hash"), "")
    lengths_of_training = dict.fromkeys(("steps", "warmup_steps", "eval_every"), 1)
    recipe = Recipe(
        model=name,
        precision=package.choose_precision("auto", device).value,  # type: ignore[arg-type]
        targets=[],
        **unknown,  # type: ignore[arg-type]
        **lengths_of_training,  # type: ignore[arg-type]
    )

    def load() -> Backend:
        return _load(model, model.path, recipe, None, plan, context)

    form = ChatFormat(model.path, template, stops=[], think=False, context=lengths.context)
    identity: list[Any] = ["model", model.content_hash(), recipe.precision, template]
    return Subject("model", identity, partial(_in_backend, load, form, False))


@contextmanager
def _in_backend(load: Callable[[], Backend], form: ChatFormat, adapter: bool) -> Iterator[Opened]:
    backend = load()
    try:
        yield Opened(
            lambda longest: nullcontext(partial(backend_loss, backend)),
            lambda: nullcontext(backend_chat_model(backend, form, "", adapter)),
        )
    finally:
        backend.close()


def _load_of_run(run: Run, kind: Kind, base: ModelFolder, context: Context) -> Backend:
    """A run's model: `adapter` on its base as trained, quantized where it was, and so `base`; `fused` in 16 bits."""
    recipe = run.recipe
    plan = runnable(run.plan, recipe, context.backends)
    if kind == "fused":
        recipe = recipe.model_copy(update={"quantization": "none"})
        fused = ModelFolder(run.path / str(run.record.export.fused))
        return _load(fused, fused.path, recipe, None, plan, context)
    ready = quantized_source(base.path) if recipe.quantization.startswith("mlx") else None
    adapter = adapter_of(run, base) if kind == "adapter" else None
    return _load(base, ready[0] if ready else base.path, recipe, adapter, plan, context)


def _load(
    model: ModelFolder, folder: Path, recipe: Recipe, adapter: Adapter | None, plan: Plan, context: Context
) -> Backend:
    """folder: that holds the weights of `model`, maybe quantized. adapter: None for the model as it is."""
    if adapter is None:
        recipe, adapter = untrained(model.path, recipe)
    with context.display.stage("load the model"):
        return loaded(context, recipe, plan, folder, adapter)[0]


def _stamp(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]

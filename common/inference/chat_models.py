"""What answers: a run's GGUF in llama.cpp, or the model itself in the backend that trained it; the base beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from common import run_record
from common.backend import Adapter, Backend
from common.context import Context
from common.data.chat_template import Message
from common.errors import UserError
from common.inference.backend_chat import ChatModel, Pieces, backend_chat_model, fitted
from common.llama_cpp.convert import base_gguf
from common.llama_cpp.install import LlamaCpp, build, find
from common.llama_cpp.server import RAW, Server, for_llama_cpp
from common.models import adapter_files as adapters
from common.models.load import TEMPLATE, base_of, loaded, runnable, say_llama
from common.models.lora_init import initial_adapter, layer_count, validate
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder, is_model_folder
from common.models.shapes import linear_shapes
from common.recipe import Recipe
from common.sampling import Sampling

Kind = Literal["gguf", "adapter", "fused", "base"]


@dataclass(frozen=True)
class ChatModels:
    tuned: ChatModel
    base: Callable[[], ChatModel]  # loaded when it is first asked for. Raises UserError where none is known


@dataclass(frozen=True)
class Target:
    """What is talked to; checked, nothing loaded. `known`: run.json, empty for a bare GGUF."""

    kind: Kind
    run: Path
    path: Path  # the GGUF, or the run folder
    quant: str  # the GGUF's, where it is a run's
    known: dict[str, Any]

    @property
    def template(self) -> Path | None:
        """The chat template as the run serves it."""
        return path if self.known and (path := self.run / TEMPLATE).exists() else None


def choose(run: Path, kind: Kind | None, quant: str | None) -> Target:
    """Of a run folder, its fused folder, or a GGUF file. Raises UserError where that is not there to be talked to."""
    if run.suffix == ".gguf":
        if kind not in (None, "gguf") or quant:
            raise UserError(
                f"{run} is a GGUF file, and can only be talked to as it is.", "Leave --with and --quant out."
            )
        if not run.is_file():
            raise UserError(f"{run}: no such file.", "Check the path.")
        return Target("gguf", run, run, "", {})
    if run.name == "fused" and is_model_folder(run) and (run.parent / "run.json").exists():
        run, kind = run.parent, kind or "fused"
    kind = kind or "gguf"
    known = run_record.read_complete(run, "options", "model_hash", "stop_ids")
    if quant and kind != "gguf":
        raise UserError(f"--quant {quant}: --with {kind} takes no GGUF.", "Leave one of them out.")
    export = known.get("export", {})
    if kind == "gguf":
        return _gguf_of(run, known, quant)
    if kind == "fused" and not (export.get("fused") and is_model_folder(run / export["fused"])):
        raise UserError(f"{run} has no fused folder.", f"Make it: python cli.py fuse {run} --export fused")
    if kind == "adapter" and known["options"].get("method") == "full":
        raise UserError(f"{run} was trained whole: it has no adapter.", "Use --with fused, or leave --with out.")
    return Target(kind, run, run, "", known)


def _gguf_of(run: Path, known: dict[str, Any], quant: str | None) -> Target:
    reports = [r for r in known.get("export", {}).get("gguf", []) if (run / r["file"]).is_file()]
    if not reports:
        raise UserError(
            f"{run} has no GGUF.",
            f"Make one: python cli.py fuse {run} --export gguf  (or talk to it without: --with adapter)",
        )
    found = [r for r in reports if quant in (None, r.get("name", r["quant"]))]
    if not found:
        has = [r.get("name", r["quant"]) for r in reports]
        raise UserError(
            f"--quant {quant}: {run} has {', '.join(has)}.",
            f"Choose one of those, or make it: python cli.py fuse {run} --export gguf --quant {quant}",
        )
    return Target("gguf", run, run / found[0]["file"], found[0]["quant"], known)


@contextmanager
def opened(
    target: Target,
    context: Context,
    length: int,
    slots: int = 1,
    flags: Sequence[str] = RAW,
) -> Iterator[ChatModels]:
    """Load what `target` names, and free it at the end. length: tokens of prompt and answer together."""
    with ExitStack() as stack:
        if target.kind == "gguf":
            yield _in_llama_cpp(target, context, partial(Server, context=length, slots=slots, flags=flags), stack)
        else:
            yield _in_backend(target, context, length, stack)


def llama_of(target: Target, context: Context) -> LlamaCpp:
    """The llama.cpp to use: named now, found or built; never one that the run's record names."""
    say_llama(target.known, context.llama_cpp, context.display)
    if (llama := find(context.llama_cpp)) is not None:
        return llama
    with context.display.stage("build llama.cpp, once") as progress:
        return build(progress)


def _in_llama_cpp(target: Target, context: Context, server: partial[Server], stack: ExitStack) -> ChatModels:
    display, llama = context.display, llama_of(target, context)
    start = partial(server, llama)
    with display.stage("start llama.cpp"):
        tuned = stack.enter_context(start(target.path))

    @cache
    def base() -> ChatModel:
        if not target.known:
            raise UserError(f"{target.run} is a bare GGUF: its base is not known.", "Give the run folder.")
        folder = base_of(target.run, target.known, display)
        gguf = base_gguf(folder.path, target.known["model_hash"], target.quant, llama, display)
        with display.stage("start llama.cpp with the base"):
            return _served(stack.enter_context(start(gguf, template=target.template)), "base")

    return ChatModels(_served(tuned, f"{target.path.name} in llama.cpp"), base)


def _served(server: Server, name: str) -> ChatModel:
    def answer(messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Pieces:
        said = [for_llama_cpp(message) for message in messages]
        yield from server.stream(fitted(said, lambda form: server.prompt(form, tools)), sampling, tools)

    return ChatModel(name, answer)


def _in_backend(target: Target, context: Context, length: int, stack: ExitStack) -> ChatModels:
    run, recipe = target.run, run_record.read_recipe(target.run)
    base_model = base_of(run, target.known, context.display)
    base_folder = base_model.path

    def load(folder: Path, recipe: Recipe, adapter: Adapter | None) -> Backend:
        plan = runnable(run_record.read_plan(run), recipe)
        if adapter is None:  # whole weights would be taken as trained, moments and all
            first = dict(list(linear_shapes(ModelFolder(folder), ["all-linear"]).items())[:1])
            plain = {
                "method": "lora",
                "rank": 1,
                "dropout": 0.0,
                "lora_plus": 1.0,
                "rank_pattern": {},
                "alpha_pattern": {},
            }
            recipe = recipe.model_copy(update=plain)
            adapter = initial_adapter(first, layer_count(first), recipe)
        with context.display.stage("load the model"):
            backend, _ = loaded(context, recipe, plan, folder, adapter)
        stack.callback(backend.close)
        return backend

    def model(backend: Backend, name: str, adapter: bool) -> ChatModel:
        think, stops = recipe.thinking == "keep", target.known["stop_ids"]
        return backend_chat_model(backend, base_folder, template, stops, think, name, adapter, length)

    template = None if target.template is None else target.template.read_text(encoding="utf-8")
    if target.kind == "fused":
        plain = recipe.model_copy(update={"quantization": "none"})
        fused = load(run / target.known["export"]["fused"], plain, None)
        base = cache(lambda: model(load(base_folder, plain, None), "base", False))
        return ChatModels(model(fused, "fused", False), base)
    whole = target.known["options"].get("method") == "full"
    final = None
    if not whole:
        shapes = linear_shapes(base_model, recipe.targets)
        final = adapters.read_trained(run, layer_count(shapes))
        validate(final, shapes, run / "adapter")
    ready = quantized_source(base_folder) if recipe.quantization.startswith("mlx") else None
    both = load(ready[0] if ready else base_folder, recipe, final)
    tuned = model(both, f"{target.kind} in {run_record.read_plan(run).backend}", target.kind == "adapter")

    def without() -> ChatModel:
        return model(both, "base", False)

    return ChatModels(tuned, without)

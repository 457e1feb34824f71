"""The model that a chat command names: a run's GGUF in llama.cpp, or a model in a backend; and the base beside it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from common.backend import Adapter, Backend
from common.context import Context
from common.data.chat_template import Message, has_think_tags
from common.data.dataset import Example
from common.data.message_forms import reasoning_as_trained
from common.data.tool_text import tools_as_text, uses_tools
from common.errors import UserError
from common.inference.backend_chat import ChatFormat, ChatModel, Pieces, adapt_messages, backend_chat_model
from common.llama_cpp.build import build
from common.llama_cpp.convert import base_gguf
from common.llama_cpp.install import LlamaCpp, find
from common.llama_cpp.server import AS_WRITTEN, Server, ServerOptions, for_llama_cpp, new_key
from common.models.load import adapter_of, base_of, loaded, runnable, say_llama
from common.models.lora_init import initial_adapter, layer_count
from common.models.mlx_quantized import quantized_source
from common.models.model_folder import ModelFolder, is_model_folder
from common.models.shapes import linear_shapes
from common.recipe import Recipe
from common.run_fields import RunRecord
from common.run_record import Run
from common.sampling import Sampling

Kind = Literal["gguf", "adapter", "fused", "base"]


@dataclass(frozen=True)
class ChatModels:
    tuned: ChatModel
    base: Callable[[], ChatModel]  # loaded at the first call. Raises UserError where none is known


@dataclass(frozen=True)
class Target:
    """What is to answer; checked, nothing loaded."""

    kind: Kind
    path: Path  # the GGUF, or the run folder
    run: Run | None  # None: a GGUF file that belongs to no run
    quant: str  # the GGUF's type, where it is a run's

    @property
    def record(self) -> RunRecord | None:
        return None if self.run is None else self.run.record

    @property
    def template(self) -> Path | None:
        """The chat template as the run serves it."""
        return self.run.template if self.run is not None and self.run.template.exists() else None


def choose(path: Path, kind: Kind | None, quant: str | None) -> Target:
    """The model that a run folder, its fused folder or a GGUF file names.

    Raises UserError where it is missing.
    """
    if path.suffix == ".gguf":
        if kind not in (None, "gguf") or quant:
            raise UserError(f"{path} is a GGUF file, which has no other forms.", "Leave --with and --quant out.")
        if not path.is_file():
            raise UserError(f"{path}: no such file.", "Check the path.")
        return Target("gguf", path, None, "")
    if path.name == "fused" and is_model_folder(path) and Run(path.parent).record_file.exists():
        path, kind = path.parent, kind or "fused"
    run, kind = Run(path), kind or "gguf"
    record = run.require_complete()
    if quant and kind != "gguf":
        raise UserError(f"--quant {quant}: --with {kind} does not use a GGUF.", "Leave one of them out.")
    if kind == "gguf":
        return _gguf_of(run, record, quant)
    if kind == "fused" and not (record.export.fused and is_model_folder(run.path / record.export.fused)):
        raise UserError(f"{run} has no fused folder.", f"Make it: python cli.py fuse {run} --export fused")
    if kind == "adapter" and record.options.get("method") == "full":
        raise UserError(
            f"{run} was trained with --method full: it has no adapter.", "Use --with fused, or leave --with out."
        )
    return Target(kind, path, run, "")


def _gguf_of(run: Run, record: RunRecord, quant: str | None) -> Target:
    present = [gguf for gguf in record.export.gguf if run.has_gguf(gguf)]
    if not present:
        raise UserError(
            f"{run} has no GGUF.",
            f"Make one: python cli.py fuse {run} --export gguf  (or chat without one: --with adapter)",
        )
    found = [gguf for gguf in present if quant in (None, gguf.name)]
    if not found:
        raise UserError(
            f"--quant {quant}: {run} has {', '.join(gguf.name for gguf in present)}.",
            f"Choose one of those, or make it: python cli.py fuse {run} --export gguf --quant {quant}",
        )
    return Target("gguf", run.path / found[0].file, run, found[0].quant)


@contextmanager
def opened(target: Target, context: Context, length: int, slots: int = 1) -> Iterator[ChatModels]:
    """Load what `target` names, and free it at the end. length: tokens of prompt and answer together."""
    with ExitStack() as stack:
        if target.run is None or target.kind == "gguf":
            models = _in_llama_cpp(target, context, ServerOptions(length, slots, flags=AS_WRITTEN), stack)
        else:
            models = _in_backend(target.run, target.kind, context, length, stack)
        if target.run is not None and writes_tools(target.run):
            tuned, base = _with_tools_as_text(models.tuned), models.base
            models = ChatModels(tuned, lambda: _with_tools_as_text(base()))
        yield models


def writes_tools(run: Run) -> bool:
    """Whether tools were text in training, as the chat template takes none (`--tools system`)."""
    return run.recipe.tools == "system" and "tools" not in (run.read_template() or "")


def _with_tools_as_text(model: ChatModel) -> ChatModel:
    def answer(messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Pieces:
        row = Example(tuple(messages), "", tuple(tools))
        return model.answer(tools_as_text(row).messages if uses_tools(row) else messages, sampling, ())

    return ChatModel(model.name, answer)


def llama_of(target: Target, context: Context) -> LlamaCpp:
    """The llama.cpp to use: given now, found or built; never one that the run's record names."""
    if target.record is not None:
        say_llama(target.record, context.llama_cpp, context.display)
    if (llama := find(context.llama_cpp)) is not None:
        return llama
    with context.display.stage("build llama.cpp, once") as progress:
        return build(progress)


def _in_llama_cpp(target: Target, context: Context, options: ServerOptions, stack: ExitStack) -> ChatModels:
    display, llama = context.display, llama_of(target, context)
    with display.stage("start llama.cpp"):
        tuned = stack.enter_context(Server(llama, target.path, options))

    @cache
    def base() -> ChatModel:
        if target.run is None:
            raise UserError(f"{target.path} is a GGUF without a run: its base is unknown.", "Give the run folder.")
        model = base_of(target.run, display)
        gguf = base_gguf(model.path, target.run.record.model_hash, target.quant, llama, display)
        with display.stage("start llama.cpp with the base"):
            server = Server(llama, gguf, replace(options, template=target.template, key=new_key()))
            return _served(stack.enter_context(server), "base", target.run)

    return ChatModels(_served(tuned, f"{target.path.name} in llama.cpp", target.run), base)


def _served(server: Server, name: str, run: Run | None) -> ChatModel:
    """run: whose model it is, prompted as in training; None: unknown, and what it is given is left as it is."""
    template = "" if run is None else run.read_template() or ""
    think = run is None or run.recipe.thinking == "keep"
    # the only name under which llama-server gives a template what is kept
    parts = not think or "reasoning_content" in template

    def answer(messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Pieces:
        given = list(messages)
        if parts:
            given = reasoning_as_trained(given, has_think_tags(template), think)
        plain = [for_llama_cpp(message) for message in given]
        yield from server.stream(adapt_messages(plain, lambda form: server.prompt(form, tools)), sampling, tools)

    return ChatModel(name, answer)


def _in_backend(run: Run, kind: Kind, context: Context, length: int, stack: ExitStack) -> ChatModels:
    """A run's models. Base and adapter are one loaded model, whose adapter is switched off for the base."""
    recipe, record, base_model = run.recipe, run.record, base_of(run, context.display)
    folder = base_model.path
    form = ChatFormat(folder, run.read_template(), record.stop_ids, recipe.thinking == "keep", length)

    def load(folder: Path, recipe: Recipe, adapter: Adapter | None) -> Backend:
        if adapter is None:
            recipe, adapter = untrained(folder, recipe)
        with context.display.stage("load the model"):
            backend, _ = loaded(context, recipe, runnable(run.plan, recipe, context.backends), folder, adapter)
        stack.callback(backend.close)
        return backend

    if kind == "fused":
        plain = recipe.model_copy(update={"quantization": "none"})
        tuned = backend_chat_model(load(run.path / str(record.export.fused), plain, None), form, "fused", False)
        base = cache(lambda: backend_chat_model(load(folder, plain, None), form, "base", False))
        return ChatModels(tuned, base)
    adapter = None if record.options.get("method") == "full" else adapter_of(run, base_model)
    ready = quantized_source(folder) if recipe.quantization.startswith("mlx") else None
    backend = load(ready[0] if ready else folder, recipe, adapter)
    name = f"{kind} in {run.plan.backend}"
    tuned = backend_chat_model(backend, form, name, kind == "adapter")
    return ChatModels(tuned, lambda: backend_chat_model(backend, form, "base", False))


def untrained(folder: Path, recipe: Recipe) -> tuple[Recipe, Adapter]:
    """An adapter of one layer that changes nothing: without one, a backend takes every weight as trained."""
    first = dict(list(linear_shapes(ModelFolder(folder), ["all-linear"]).items())[:1])
    changes: dict[str, Any] = {"method": "lora", "rank": 1, "dropout": 0.0, "lora_plus": 1.0}
    plain = recipe.model_copy(update=changes | {"rank_pattern": {}, "alpha_pattern": {}})
    return plain, initial_adapter(first, layer_count(first), plain)

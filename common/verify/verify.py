"""`verify RUN`: whether what llama.cpp runs is what was trained, step by step from the adapter to each GGUF."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from common.backend import Adapter, Backend, LoraWeight, Progress
from common.backend_package import Backends
from common.context import Context
from common.data.encode import load_tokenizer
from common.display import Display
from common.errors import Unable, UserError
from common.llama_cpp.build import own
from common.llama_cpp.convert import convert
from common.llama_cpp.install import LlamaCpp, find
from common.llama_cpp.logits import GgufLogits
from common.models.fuse import differing
from common.models.load import adapter_of, base_of, loaded, runnable, say_llama
from common.models.lora_init import layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.recipe import Plan, Recipe
from common.run_lock import held
from common.run_record import Run
from common.system.disk import require_disk
from common.verify.cases import cases_of
from common.verify.divergence import Divergence, LogitsAt, Positions, Reference, choose_positions
from common.verify.judge import judge_fused, judge_quants, verdict
from common.verify.server_checks import Check, VerifyInput, server_checks
from common.verify_record import COMPARED, DivergenceRecord, VerifyRecord


def verify_run(run: Path, context: Context) -> list[Check]:
    """`verify RUN`. Raises UserError as `verify_held`, and where another process is at work on the run."""
    folder = Run(run)
    record = folder.require_complete()
    with held(run):
        say_llama(record, context.llama_cpp, context.display)
        _ggufs_of(folder)  # before the base is read
        base = base_of(folder, context.display)
        return verify_held(folder, base, adapter_of(folder, base), context)


def verify_held(
    run: Run, base: ModelFolder, adapter: Adapter, context: Context, bf16_gguf: Path | None = None
) -> list[Check]:
    """Every check that was made, kept in run.json too. The caller holds the run.

    adapter: what was trained. bf16_gguf: made again where there is none. Raises UserError
    where something that is needed is missing: fused folder, GGUF, the data of an older version's run, a backend; and
    Unable, with nothing kept, where this machine cannot compute it.
    """
    display, ggufs = context.display, _ggufs_of(run)
    with ExitStack() as stack:
        bf16_gguf = next((path for name, path in ggufs if name == "BF16"), None) or bf16_gguf
        if bf16_gguf is None:
            llama = find(context.llama_cpp) or _own(display)
            bf16_gguf = stack.enter_context(run.bf16_gguf())
            require_disk([(run.gguf, "the bf16 GGUF", 2 * base.parameter_count)], "Free some space.")
            with display.stage("the bf16 GGUF again, to compare with") as progress:
                convert(run.fused, bf16_gguf, "verify", llama, progress)
        found = verify_files(run, base, adapter, context, bf16_gguf)
    display.say(f"Verdict: {found.record.verdict}.")
    run.update(verify=found.record, attest=None)  # an attest states the one before
    return found.checks


@dataclass(frozen=True)
class Found:
    """What was found, as it is and as run.json keeps it."""

    checks: list[Check]
    record: VerifyRecord


def verify_files(run: Run, base: ModelFolder, adapter: Adapter, context: Context, bf16_gguf: Path) -> Found:
    """Every check of the run's files, printed. Nothing is written into the run. Raises UserError as verify_held."""
    recipe, ggufs = run.recipe, _ggufs_of(run)
    plan = runnable(run.plan, recipe, context.backends)
    cases, tokenizer = cases_of(run, base.path), load_tokenizer(run.fused)
    if not cases.rows:
        raise UserError(f"{run.record.options.get('data')}: no row is left for verification.", "Use --no-verify.")
    control = "".join(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)[:2000]
    if control:
        cases = replace(cases, texts=[*cases.texts, f"a{control}b"])
    ours = _own(context.display)
    given = VerifyInput(
        run=run,
        base=base,
        adapter=adapter,
        recipe=recipe,
        plan=plan,
        stops=run.record.stop_ids,
        over_quantized=run.record.export.fuse_into == "dequantized",
        bf16_gguf=bf16_gguf,
        ggufs=ggufs,
        llama=find(context.llama_cpp) or ours,
        tool=cast(Path, ours.logits),
        cases=cases,
        tokenizer=tokenizer,
    )
    return _verify(given, context)


def _own(display: Display) -> LlamaCpp:
    with display.stage("find or build llama.cpp") as progress:
        return own(progress)


def _ggufs_of(run: Run) -> list[tuple[str, Path]]:
    """`(name, file)` of each, the first file of one that is split. Raises UserError where a file is missing."""
    ggufs = [(gguf.name, run.path / gguf.file) for gguf in run.record.export.gguf]
    files = [run.path / file for gguf in run.record.export.gguf for file in gguf.files]
    missing = [path for path in (run.fused, *files) if not path.exists()]
    if missing or not ggufs:
        what = missing[0] if missing else "a GGUF"
        raise UserError(f"{run} lacks {what}: nothing can be compared.", f"python cli.py fuse {run} --export gguf")
    return ggufs


def _verify(given: VerifyInput, context: Context) -> Found:
    """Every check, cheapest first, printed; a failure of all is one too."""
    checks: list[Check] = []
    display = context.display
    with display.stage("verify: tokens, prompts, stops") as progress:
        try:
            for check in server_checks(given, progress):
                checks.append(check)
        except Unable:
            raise
        except UserError as error:
            checks.append(Check("llama.cpp", "broken", error.what))
    at = choose_positions(given.cases.rows, given.base.vocabulary_size)
    links: dict[str, Divergence] = {}
    with display.stage("verify: distributions") as progress:
        try:
            _compare_trained(given, at, context, links, progress)
            _compare_quants(given, at, links, progress)
        except Unable:
            raise
        except UserError as error:
            checks.append(Check("distributions", "broken", error.what))
    if given.adapter.full:
        checks.append(_full_weights(given))
    if "base" in links:
        checks += [*judge_fused(links), *judge_quants([name for name, _ in given.ggufs], links)]
    _show(given, checks, links, display)
    record = VerifyRecord(
        verdict=verdict(checks),
        checks=[asdict(check) for check in checks],
        divergence={name: DivergenceRecord(**asdict(link)) for name, link in links.items()},
        rows=len(at.ids),
        held_out=given.cases.held_out,
    )
    return Found(checks, record)


def _compare_trained(
    given: VerifyInput, at: Positions, context: Context, links: dict[str, Divergence], progress: Progress
) -> None:
    """Base with tuned, fused with adapter on base, by the backend that trained; then the bf16 GGUF with fused."""
    recipe, plan = _exact(given, context.backends)
    plain, neutral = recipe.model_copy(update={"quantization": "none"}), _neutral_adapter(given.base)
    tuned = None
    if not given.adapter.full:
        progress(0.0, "adapter on base")
        with _loaded(context, recipe, plan, given.base.path, given.adapter) as backend:
            tuned = Reference(at, _logits_of(backend, True))
            links["base"] = tuned.divergence(_logits_of(backend, False))
    progress(0.25, "fused")
    with _loaded(context, plain, plan, given.run.fused, neutral) as backend:
        if tuned is not None:
            links["fused"] = tuned.divergence(_logits_of(backend, False))
        fused = Reference(at, _logits_of(backend, False))
    if tuned is None:  # every weight was trained: what is fused is what was trained
        with _loaded(context, plain, plan, given.base.path, neutral) as backend:
            links["base"] = fused.divergence(_logits_of(backend, False))
    del tuned
    progress(0.5, "bf16 GGUF")
    with GgufLogits(given.tool, given.bf16_gguf, max(map(len, at.ids))) as model:
        links["BF16"] = fused.divergence(model)


def _compare_quants(given: VerifyInput, at: Positions, links: dict[str, Divergence], progress: Progress) -> None:
    """Each quantized GGUF with the bf16 one."""
    context, quants = max(map(len, at.ids)), [(n, path) for n, path in given.ggufs if path != given.bf16_gguf]
    if not quants:
        return
    with GgufLogits(given.tool, given.bf16_gguf, context) as model:
        reference = Reference(at, model)
    for number, (name, gguf) in enumerate(quants):
        progress(0.6 + 0.4 * number / len(quants), name)
        with GgufLogits(given.tool, gguf, context) as model:
            links[name] = reference.divergence(model)


def _exact(given: VerifyInput, backends: Backends) -> tuple[Recipe, Plan]:
    """float32 where it fits into memory, else as trained; over the quantized base where the adapter was fused there.

    On the CPU where no device of those that trained can hold the model.
    """
    plan = given.plan.model_copy(update={"gradient_checkpointing": False, "memory_budget": 0})
    free = backends(plan.backend).free_memory(plan.device_name)[0]
    least = 2.2 if given.recipe.precision == "bf16" else 4.4  # bytes of a weight, with some room
    if given.run.plan.sharded and least * given.base.parameter_count > free:
        plan = plan.on("cpu")
        free = backends(plan.backend).free_memory("cpu")[0]
    fits = 4.4 * given.base.parameter_count < free
    recipe = given.recipe.model_copy(
        update={
            "precision": "fp32" if fits else given.recipe.precision,
            "method": "dora" if given.adapter.dora else "lora",
            "dropout": 0.0,
            "quantization": given.recipe.quantization if given.over_quantized else "none",
        }
    )
    return recipe, plan


def _neutral_adapter(base: ModelFolder) -> Adapter:
    """An adapter that changes nothing, so that a model is loaded to be looked at and not to be trained."""
    shapes = linear_shapes(base, ["all-linear"])
    name, (out_features, in_features) = next(iter(shapes.items()))
    weight = LoraWeight(np.zeros((1, in_features), np.float32), np.zeros((out_features, 1), np.float32), 1.0)
    return Adapter("", layer_count(shapes), 0.0, {name: weight})


@contextmanager
def _loaded(context: Context, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter) -> Iterator[Backend]:
    recipe = recipe.model_copy(update={"method": "dora" if adapter.dora else "lora"})
    backend, _ = loaded(context, recipe, plan, folder, adapter)
    try:
        yield backend
    finally:
        backend.close()


def _logits_of(backend: Backend, adapter: bool) -> LogitsAt:
    return lambda ids, positions: backend.logits(ids, adapter, positions)


def _full_weights(given: VerifyInput) -> Check:
    """After full fine-tuning there is no adapter to compare with: the fused folder must hold what was trained."""
    wrong, count = differing(ModelFolder(given.run.fused), given.adapter.full), len(given.adapter.full)
    shown = f", not {wrong[0]}" if wrong else ""
    text = f"{count - len(wrong)} of {count} trained tensors are in the fused folder, equal to the byte{shown}"
    return Check("fused weights", "broken" if wrong else "ok", text)


def _show(given: VerifyInput, checks: list[Check], links: dict[str, Divergence], display: Display) -> None:
    if links:
        display.table(
            f"{next(iter(links.values())).positions} label tokens of {len(given.cases.rows)} "
            f"{'validation' if given.cases.held_out else 'TRAINING'} rows",
            ["", "against", "mean KL", "p99 KL", "top-1 agreement", "perplexity"],
            [
                [
                    *COMPARED.get(name, (name, "BF16 GGUF")),
                    f"{link.mean_kl:.5f}",
                    f"{link.p99_kl:.4f}",
                    f"{link.same_top:.1%}",
                    f"{link.perplexity:.3f}",
                ]
                for name, link in links.items()
            ],
        )
    if (base := given.run.record.base) and base.form:
        display.say(
            f"About the base: {base.form} Such weights lose nothing when they are quantized again on the same grid, so "
            "the figures look better than for another base. Changes of training below half a step of that grid are "
            "rounded away."
        )
    mark = {"ok": ("ok", "green"), "note": ("note", "yellow"), "broken": ("BROKEN", "bold red")}
    display.table("Checks", ["", "", "found"], [[check.name, mark[check.state], check.text] for check in checks])

"""`verify RUN`: whether what llama.cpp runs is what was trained, link by link from the adapter to each GGUF."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
from rich.text import Text

from common import run_record
from common.backend import Adapter, Backend, LoraWeight, Progress
from common.context import Context
from common.data.load import data_of
from common.display import Display
from common.errors import UserError
from common.llama_cpp.convert import convert
from common.llama_cpp.install import find, own
from common.llama_cpp.logits import GgufLogits
from common.models import adapter_files as adapters
from common.models.fuse import differing
from common.models.load import base_of, loaded, runnable, say_llama
from common.models.lora_init import layer_count
from common.models.model_folder import ModelFolder
from common.models.shapes import linear_shapes
from common.options import Options
from common.recipe import Plan, Recipe
from common.run_record import held
from common.system.hardware import free_memory
from common.verify.cases import collect
from common.verify.divergence import Divergence, LogitsAt, Reference, Rows, choose_rows
from common.verify.server_checks import Check, State, VerifyInput, by_server

# KL below this is the rounding of bf16 weights, activations and of llama.cpp's float16 cache, not a fault.
_ROUNDING = 2e-3
_FAR = 0.02  # and this is never only rounding
_LOST, _GONE = 0.1, 0.5  # of the tune's own KL: a quantization that takes more is flagged, or called broken
_TUNED = 0.5  # a tune of less is so small that any 4 bits drown it
_LADDER = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "BF16")  # each with clearly more bits than the last


def verify_run(run: Path, context: Context) -> list[Check]:
    """`verify RUN`. Raises UserError as `verify_held`, and where another process is at work on the run."""
    known = run_record.read_complete(run)
    with held(run):
        say_llama(known, context.llama_cpp, context.display)
        return verify_held(run, context, None)


def verify_held(run: Path, context: Context, whole: Path | None) -> list[Check]:
    """Every check that was made, kept in run.json too. The caller holds the run. `whole`: the bf16 GGUF, or None.

    Raises UserError where something that is needed is missing: base, data, fused folder, GGUF, a backend.
    """
    display = context.display
    known = run_record.read_complete(run, "options", "model_hash", "stop_ids", "export")
    options, recipe = Options.model_validate(known["options"]), run_record.read_recipe(run)
    ggufs = [(report.get("name", report["quant"]), run / report["file"]) for report in known["export"].get("gguf", [])]
    missing = [path for path in (run / "fused", *(path for _, path in ggufs)) if not path.exists()]
    if missing or not ggufs:
        what = missing[0] if missing else "a GGUF"
        raise UserError(f"{run} lacks {what}: nothing can be compared.", f"python cli.py fuse {run} --export gguf")
    plan = runnable(run_record.read_plan(run), recipe)
    base = base_of(run, known, display)
    probes = collect(run, base.path, data_of(run, options, recipe))
    if not probes.rows:
        raise UserError(f"{options.data}: no row is left to verify with.", "Go without: --no-verify.")
    llama = find(context.llama_cpp)
    with display.stage("find or build llama.cpp") as progress:
        ours = own(progress)
    final = adapters.read_trained(run, layer_count(linear_shapes(base, ["all-linear"])))
    with ExitStack() as stack:
        whole = whole or next((path for name, path in ggufs if name == "BF16"), None)
        if whole is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=run / "gguf", prefix=".verify-")))
            whole = folder / "model-BF16.gguf"
            with display.stage("the bf16 GGUF again, to compare with") as progress:
                convert(run / "fused", whole, "verify", llama or ours, progress)
        subject = VerifyInput(
            run=run,
            base=base,
            final=final,
            recipe=recipe,
            plan=plan,
            stops=known["stop_ids"],
            over_quantized=known["export"].get("fuse_into") == "dequantized",
            whole=whole,
            ggufs=ggufs,
            llama=llama or ours,
            tool=cast(Path, ours.logits),
            probes=probes,
        )
        return verify(subject, context)


def verify(subject: VerifyInput, context: Context) -> list[Check]:
    """Every check, cheapest first, printed and kept in run.json under `verify`; what fails altogether is one too."""
    checks: list[Check] = []
    display = context.display
    with display.stage("verify: tokens, prompts, stops") as progress:
        try:
            for check in by_server(subject, progress):
                checks.append(check)
        except UserError as error:
            checks.append(Check("llama.cpp", "broken", error.what))
    rows = choose_rows(subject.probes.rows, subject.base.vocabulary_size)
    links: dict[str, Divergence] = {}
    with display.stage("verify: distributions") as progress:
        try:
            _trained(subject, rows, context, links, progress)
            _ggufs(subject, rows, links, progress)
        except UserError as error:
            checks.append(Check("distributions", "broken", error.what))
    if subject.final.full:
        checks.append(_whole_weights(subject))
    if "base" in links:
        checks += [*_judge_fused(links), *_judge_quants([name for name, _ in subject.ggufs], links)]
    _show(subject, checks, links, display)
    run_record.update_run(
        subject.run,
        verify={
            "verdict": verdict(checks),
            "checks": [asdict(check) for check in checks],
            "divergence": {name: asdict(link) for name, link in links.items()},
            "rows": len(rows.ids),
            "held_out": subject.probes.held_out,
        },
    )
    return checks


def verdict(checks: list[Check]) -> str:
    """`broken`, `sound with remarks` or `sound`."""
    states = {check.state for check in checks}
    return "broken" if "broken" in states else "sound with remarks" if "note" in states else "sound"


def _trained(
    subject: VerifyInput,
    rows: Rows,
    context: Context,
    links: dict[str, Divergence],
    progress: Progress,
) -> None:
    """Base against tuned, fused against adapter on base, by the backend that trained; then the bf16 GGUF."""
    recipe, plan = _exact(subject)
    plain, nothing = recipe.model_copy(update={"quantization": "none"}), _nothing(subject)
    tuned = None
    if not subject.final.full:
        progress(0.0, "adapter on base")
        with _loaded(context, recipe, plan, subject.base.path, subject.final) as backend:
            tuned = Reference(rows, _of(backend, True))
            links["base"] = tuned.divergence(_of(backend, False))
    progress(0.25, "fused")
    with _loaded(context, plain, plan, subject.run / "fused", nothing) as backend:
        if tuned is not None:
            links["fused"] = tuned.divergence(_of(backend, False))
        fused = Reference(rows, _of(backend, False))
    if tuned is None:  # every weight was trained: what is fused is what was trained
        with _loaded(context, plain, plan, subject.base.path, nothing) as backend:
            links["base"] = fused.divergence(_of(backend, False))
    del tuned
    progress(0.5, "bf16 GGUF")
    with GgufLogits(subject.tool, subject.whole, max(map(len, rows.ids))) as model:
        links["BF16"] = fused.divergence(model)


def _ggufs(subject: VerifyInput, rows: Rows, links: dict[str, Divergence], progress: Progress) -> None:
    context, quants = max(map(len, rows.ids)), [(n, path) for n, path in subject.ggufs if path != subject.whole]
    if not quants:
        return
    with GgufLogits(subject.tool, subject.whole, context) as model:
        whole = Reference(rows, model)
    for number, (name, gguf) in enumerate(quants):
        progress(0.6 + 0.4 * number / len(quants), name)
        with GgufLogits(subject.tool, gguf, context) as model:
            links[name] = whole.divergence(model)


def _exact(subject: VerifyInput) -> tuple[Recipe, Plan]:
    """float32 where it fits into memory, else as trained; over the quantized base where the adapter was fused there."""
    plan = subject.plan.model_copy(update={"gradient_checkpointing": False, "memory_budget": 0})
    fits = 4.4 * subject.base.parameter_count < free_memory(plan.backend, plan.device)[0]
    recipe = subject.recipe.model_copy(
        update={
            "precision": "fp32" if fits else subject.recipe.precision,
            "method": "dora" if subject.final.dora else "lora",
            "dropout": 0.0,
            "quantization": subject.recipe.quantization if subject.over_quantized else "none",
        }
    )
    return recipe, plan


def _nothing(subject: VerifyInput) -> Adapter:
    """An adapter that changes nothing, so that a model is loaded to be looked at and not to be trained."""
    shapes = linear_shapes(subject.base, ["all-linear"])
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


def _of(backend: Backend, adapter: bool) -> LogitsAt:
    return lambda ids, positions: backend.logits(ids, adapter, positions)


def _whole_weights(subject: VerifyInput) -> Check:
    """After full fine-tuning there is no adapter to compare with: the fused folder must hold what was trained."""
    wrong, count = differing(ModelFolder(subject.run / "fused"), subject.final.full), len(subject.final.full)
    shown = f", not {wrong[0]}" if wrong else ""
    text = f"{count - len(wrong)} of {count} trained tensors stand in the fused folder to the byte{shown}"
    return Check("fused weights", "broken" if wrong else "ok", text)


def _finite(link: Divergence) -> bool:
    """False for NaN or infinity, to which every comparison answers no."""
    return all(map(math.isfinite, (link.mean_kl, link.p99_kl, link.perplexity)))


def _judge_fused(links: dict[str, Divergence]) -> Iterator[Check]:
    tune = links["base"].mean_kl
    for name, what, against in (("fused", "fused", "adapter on base"), ("BF16", "bf16 GGUF", "fused")):
        if name in links:
            link = links[name]
            near = link.mean_kl <= _ROUNDING or link.mean_kl <= min(_FAR, _LOST * tune)
            wrong = not (near and _finite(link) and math.isfinite(tune))
            far = f", logits at most {link.max_logit:.2g} apart" if name == "fused" else ""
            text = f"KL {link.mean_kl:.2g} from {against}{far}; the tune itself is {tune:.2g}"
            # too small a tune cannot be told from its absence by its effect
            hidden = not wrong and link.mean_kl > 0.5 * tune
            state: State = "broken" if wrong else "note" if hidden else "ok"
            yield Check(what, state, text + (": rounding is as large as the tune" if hidden else ""))


def _judge_quants(names: list[str], links: dict[str, Divergence]) -> Iterator[Check]:
    tune = links["base"].mean_kl
    for name in names:
        if name in links and name != "BF16":
            lost = links[name].mean_kl / max(tune, 1e-12)
            if not (_finite(links[name]) and math.isfinite(lost)):
                yield Check(name, "broken", "its logits, or those it is compared with, are not finite: NaN or infinite")
                continue
            gone = lost > _GONE and tune > _TUNED
            text = f"KL {links[name].mean_kl:.2g} from the bf16 GGUF, "
            text += f"{lost:.1%} of the tune's own {tune:.2g}" if lost < 10 else f"the tune's own is only {tune:.2g}"
            if lost > _LOST:
                part = "most" if gone else "a noticeable part"
                text += f": {part} of the tune is lost; try --quant {_better(name.removesuffix('-imatrix'))}"
            yield Check(name, "broken" if gone else "note" if lost > _LOST else "ok", text)


def _better(quant: str) -> str:
    """The next type that keeps clearly more."""
    return "BF16" if quant in ("BF16", "F16") else next(q for q in _LADDER if q == "BF16" or q[1] > quant[1])


def _show(subject: VerifyInput, checks: list[Check], links: dict[str, Divergence], display: Display) -> None:
    names = {"base": "base, untuned", "fused": "fused", "BF16": "BF16 GGUF"}
    against = {"base": "tuned", "fused": "tuned", "BF16": "fused"}
    if links:
        display.table(
            f"{next(iter(links.values())).positions} label tokens of {len(subject.probes.rows)} "
            f"{'held-out' if subject.probes.held_out else 'TRAINING'} rows",
            ["", "against", "mean KL", "99 %", "same first token", "perplexity"],
            [
                [
                    names.get(name, name),
                    against.get(name, "BF16 GGUF"),
                    f"{link.mean_kl:.5f}",
                    f"{link.p99_kl:.4f}",
                    f"{link.same_top:.1%}",
                    f"{link.perplexity:.3f}",
                ]
                for name, link in links.items()
            ],
        )
    if form := run_record.read_run(subject.run).get("base", {}).get("form"):
        display.say(
            f"About the base: {form} Quantized again on the same grid such weights lose nothing, which flatters the "
            "figures; but what the tune moves by less than half a step of that grid is rounded away, which does not."
        )
    mark = {"ok": Text("ok", "green"), "note": Text("note", "yellow"), "broken": Text("BROKEN", "bold red")}
    display.table("Checks", ["", "", "found"], [[check.name, mark[check.state], check.text] for check in checks])
    display.say(f"Verdict: {verdict(checks)}.")

"""How a run continues: from its newest checkpoint, by its own recipe or a longer one, by its own plan or another."""

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from common.data.batching import steps_per_epoch
from common.errors import PROGRAM, UserError
from common.models.resolve import resolve
from common.option_sources import FLAGS_ONLY, absolute_paths, options_over
from common.options import RESUME_OPTIONS, Options, by_flag
from common.recipe import Parent, Plan, Recipe
from common.run_fields import RunRecord
from common.run_record import Run
from common.system.environment import environment_changes
from common.training import checkpoint
from common.training.checkpoint import Checkpoint
from common.training.schedule import learning_rate
from common.training.setup import length

# What sends a model or rows elsewhere is never taken from a record, which may be a stranger's.
_ASKED = (*FLAGS_ONLY, "push")
_PLACES = ("model", "data", "adapter", "chat_template")  # may have moved; their contents are known by hash


def asked(options: dict[str, Any], names: Collection[str] = _ASKED) -> str:
    """Those of the options that a resume does not take from the record, as they are typed: ` --push me/model`."""
    words: list[str] = []
    for name in names:
        if value := options.get(name):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def resume_command(run: object, options: Options) -> str:
    """The command that resumes the run, with what it does not take from the record."""
    return f"{PROGRAM} train --resume {run}{asked(options.model_dump(by_alias=True))}"


def say_asked(record: RunRecord, given: Options, say: Callable[[str], None]) -> None:
    """Say so where the run was begun with what is not taken from its record, and not given now."""
    now = given.model_dump(by_alias=True, exclude_unset=True)
    if flags := asked({name: value for name, value in record.options.items() if name not in now}):
        say(
            f"The run was begun with{flags}. What sends a model or rows elsewhere is never taken from a run's record: "
            "to have it, give it again."
        )


def check_places(run: Run, options: Options, given: Collection[str], names: Collection[str] = _PLACES) -> None:
    """Raises UserError where what the run was begun with is no longer where its record says, and none was `given`."""
    for name in names:
        value = [] if name in given else getattr(options, name) or []
        places = [value] if isinstance(value, str) else value
        for place in places:
            if Path(place).is_absolute() and not Path(place).exists():
                every = ", all sources in their order" if len(places) > 1 else ""
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{run} was begun with {flag} {place}, which is not there.",
                    f"Restore it, or say where it is now: {flag} PATH{every}.",
                )


def keep_model(run: Run, model: str, say: Callable[[str], None]) -> None:
    """Put on record where the base model is now. Raises UserError where that is another model."""
    if resolve(model, say, tried=True).content_hash() != run.record.model_hash:
        raise UserError(f"--model {model} is not the model that {run} was trained on.", "Give that model.")
    run.update(**_with_places(run.record, {"model": model}))


def _with_places(record: RunRecord, given: dict[str, Any]) -> dict[str, Any]:
    """What the record says of the run's options, with the places that are given now."""
    places = absolute_paths({name: given[name] for name in _PLACES if given.get(name)})
    options, was = record.options | {"llama_cpp": record.named_llama_cpp} | places, record.options.get("model") or ""
    replaced = "model" in places and was and not Path(was).is_absolute()
    return {"options": options, "hub_model": was if replaced else record.hub_model}


def options_to_resume(options: Options, run: Run) -> Options:
    """Of a command that is to continue the run: what was given that a run may be given again."""
    given = options.model_dump(by_alias=True, exclude_unset=True)
    left_out = {"steps", "epochs", *(() if options.resume else _PLACES)}  # on record, those of a new run from its start
    kept = {name: given[name] for name in given.keys() & RESUME_OPTIONS - left_out}
    return Options.model_validate(kept | {"resume": str(run.path)})


def resumed_options(options: Options, run: Run) -> Options:
    """The run's options, with those that were given now.

    What was `auto` stays what it became, unless the run moves to another backend. Raises UserError where it cannot.
    """
    if options.finish and (options.steps or options.epochs):
        raise UserError("--finish and a length cannot be combined.", "Leave out --steps and --epochs, or --finish.")
    recipe, plan = run.resumable_recipe(), run.plan
    given = options.model_dump(by_alias=True, exclude_unset=True)
    kept = {name: value for name, value in plan.model_dump().items() if name in Options.model_fields}
    kept |= {name: getattr(recipe, name) for name in ("precision", "eval_rows", "eval_every", "patience", "min_delta")}
    kept |= {name: by_flag()[name].get_default() for name in _ASKED}
    kept |= {"devices": None}  # as many as this time
    kept["finish"] = run.record.finished_step is not None and not (options.steps or options.epochs)
    if options.devices in (None, "1"):
        kept["shard"] = None
    if str(run.record.options.get("device")).startswith("cuda:") and plan.device == "cuda":
        del kept["device"]  # a GPU that was asked for, not the freest of that day
    if "memory_limit" in given:  # a new plan
        kept |= {"micro_batch_tokens": None, "gradient_checkpointing": None}
    if given.get("backend", plan.backend) != plan.backend:
        if recipe.quantization != "none":
            raise UserError(
                f"--backend {given['backend']}: {run} has a base quantized by {plan.backend} ({recipe.quantization}), "
                "which another backend cannot compute.",
                "Continue with the backend it was started with.",
            )
        kept |= {"device": "auto", "micro_batch_tokens": None, "gradient_checkpointing": None, "shard": None}
    merged = options_over(run.record.options | kept, given)
    check_places(run, merged, given)
    return merged


def parent_of(given: Options, options: Options, run: Run) -> Parent | None:
    """The recipe that the run's next steps continue: its own parent, or its own recipe where `given` has a length.

    options: the run's with `given` over them. Raises UserError where that length leaves nothing to train.
    """
    record = run.record
    if given.steps is None and given.epochs is None:
        return record.parent
    parent = checkpoint.latest_recipe(run.path, record.recipe_hash)
    if parent is None and (_is_lost(run) or (record.parent and record.parent.step)):
        raise _no_checkpoint(run)
    what = f"--steps {given.steps}" if given.steps else f"--epochs {given.epochs:g}"
    steps = length(options, record.data.train_rows)[0]
    if parent and steps <= parent.step:
        epochs = parent.step / max(1, steps_per_epoch(record.data.train_rows, options.batch_size))
        raise UserError(
            f"{what}: {run} has trained {parent.step} steps already ({epochs:.3g} epochs).",
            "Give the total that it is to reach.",
        )
    if steps == _length_on_record(record)[0] and record.finished_step is None:
        raise UserError(
            f"{what}: {run} goes to {steps} steps already.", "Leave it out to finish the run; or give more."
        )
    return parent or record.parent


def as_begun(run: Run, recipe: Recipe) -> Recipe:
    """The recipe, as prepared now, with what the run keeps from its beginning: its warm-up once it has steps.

    A warm-up that is a share of the steps would otherwise start again in a longer run.
    """
    kept = {"warmup_steps": run.recipe.warmup_steps} if recipe.parent is not None else {}
    return recipe.model_copy(update=kept)


def change_length(run: Run, recipe: Recipe, options: Options) -> str:
    """Put the recipe of another length on record. Returns what becomes of the learning rate, in a line.

    recipe, options: as prepared now. Raises UserError where more than the length has changed.
    """
    record = run.record
    steps, warmup_steps = _length_on_record(record)
    if record.parent is not None:
        warmup_steps = run.recipe.warmup_steps
    changes = {"steps": steps, "warmup_steps": warmup_steps, "parent": record.parent}
    before = recipe.model_copy(update=changes)
    _check_unchanged(run, before)
    kept = record.options | {"steps": options.steps, "epochs": options.epochs, "llama_cpp": record.named_llama_cpp}
    # decides; recipe.yaml follows it
    run.update(recipe_hash=recipe.hash(), parent=recipe.parent, options=kept, finished_step=None)
    run.write_recipe(recipe)
    step = recipe.parent.step if recipe.parent else 0
    after = f", after {learning_rate(before, step):.2g} at step {step}" if step else ""
    return (
        f"{run} goes to {recipe.steps} steps instead of {record.finished_step or steps}. The learning rate now follows "
        f"the schedule of {recipe.steps} steps: {learning_rate(recipe, step + 1):.2g} at step {step + 1}{after}."
    )


def _length_on_record(record: RunRecord) -> tuple[int, int]:
    return length(options_over(record.options, {}), record.data.train_rows)


def _is_lost(run: Run) -> bool:
    """Of a run without a complete checkpoint: whether it had one, so that training again would lose its results."""
    record = run.record
    saved = record.saved_recipe == record.recipe_hash and not any(run.checkpoints.glob("step-*"))
    return saved or record.status == "complete"


def _no_checkpoint(run: Run) -> UserError:
    fix = "Restore its checkpoints/, or start a new run."
    if run.record.status == "complete":
        fix = (
            f"What it has trained is kept. To export it: python cli.py fuse {run}. "
            f"To train it further, start a new run with --adapter {run}"
        )
    return UserError(f"{run} has no checkpoint to continue from.", fix)


def _check_unchanged(run: Run, recipe: Recipe) -> None:
    """Raises UserError where `recipe`, as prepared now, is not the one on record."""
    if run.record.recipe_hash != recipe.hash():
        old, new = run.recipe.hashed(), recipe.hashed()
        changed = ", ".join(name for name in new if new[name] != old.get(name))
        fix = "Restore the old files, or start a new run."
        if "rows_hash" in changed:
            fix = (
                f"{fix} If no file has changed, this version divides or labels some rows otherwise: resume the run "
                "with the version that began it (environment.json names it)."
            )
        raise UserError(f"{run}: its recipe has changed since it began (changed: {changed or 'its recipe.yaml'}).", fix)


def resume_run(
    run: Run,
    recipe: Recipe,
    plan: Plan,
    warn: Callable[[str], None],
    finish: bool = False,
    given: Options | None = None,
) -> Checkpoint | None:
    """The checkpoint to continue from, None before the first; the record is brought up to date.

    recipe, plan: as prepared now. Another plan than the run's takes its place. `warn` hears of a checkpoint that is
    passed over, and of another environment. given: options of this command, of which places are put on record. Raises
    UserError for another recipe, for a run whose checkpoints are gone, and where nothing is there to finish.
    """
    record = run.record
    _check_unchanged(run, recipe)
    if run.recipe.hash() != recipe.hash():  # killed while its length was changed
        run.write_recipe(recipe)
    if changes := environment_changes(run.path):
        warn(f"not the environment that the run began in, so the last digits may differ: {', '.join(changes)}")
    if recipe.parent is not None:
        checkpoint.discard_stale(run.path, recipe.hash(), recipe.parent)
    found, plans = checkpoint.latest(run.path, recipe.hash(), warn, recipe.parent), record.plans
    if found is None and (_is_lost(run) or (recipe.parent is not None and recipe.parent.step)):
        raise _no_checkpoint(run)
    if finish and found is None:  # before anything is written
        raise UserError(f"--finish: {run} has no checkpoint.", f"Continue it: python cli.py train --resume {run}")
    if _without_budget(plan) != _without_budget(run.plan):
        if found and _of_memory(plan) != _of_memory(run.plan):  # else it knows what turned out to fit
            found.state.micro_batch_tokens = plan.micro_batch_tokens
            found.state.gradient_checkpointing = plan.gradient_checkpointing
        run.write_plan(plan)
        from_step = found.state.step + 1 if found else 1
        plans = [*plans, {"from_step": from_step} | plan.model_dump()]
    if found is None and recipe.parent is None and run.metrics.exists():
        warn(f"{run} has no checkpoint: training starts again at step 1")
    run.update(
        status="training",
        plans=plans,
        attest=None,  # it states the run as it was
        **_with_places(record, given.model_dump(include={*_PLACES}) if given else {}),
        saved_recipe=recipe.hash() if found else "",
    )
    return found


def _of_memory(plan: Plan) -> tuple[object, ...]:
    """What of the plan determines the memory that a step takes."""
    return plan.micro_batch_tokens, plan.gradient_checkpointing, plan.backend, plan.device, plan.ranks, plan.sharded


def _without_budget(plan: Plan) -> Plan:
    """The plan without what the machine happened to have free."""
    return plan.model_copy(update={"memory_budget": 0})

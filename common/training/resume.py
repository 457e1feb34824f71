"""How a stopped run continues: by its own recipe, from its newest checkpoint, by its own plan or another."""

from collections.abc import Callable

from common.errors import UserError
from common.option_sources import options_over
from common.options import Options
from common.recipe import Plan, Recipe
from common.run_record import Run
from common.system.environment import environment_changes
from common.training import checkpoint
from common.training.checkpoint import Checkpoint


def resumed_options(options: Options, run: Run) -> Options:
    """The run's options, with those that were given now.

    What was `auto` stays what it became, unless the run moves to another backend. Raises UserError where it cannot.
    """
    recipe, plan = run.resumable_recipe(), run.plan
    given = options.model_dump(by_alias=True, exclude_unset=True)
    kept = {name: value for name, value in plan.model_dump().items() if name in Options.model_fields}
    kept["precision"] = recipe.precision
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
        kept |= {"device": "auto", "micro_batch_tokens": None, "gradient_checkpointing": None}
    return options_over(run.record.options | kept, given)


def resume_run(run: Run, recipe: Recipe, plan: Plan, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from, None before the first; the record is brought up to date.

    recipe, plan: as prepared now. Another plan than the run's takes its place. `warn` hears of a checkpoint that is
    passed over, and of another environment. Raises UserError for another recipe.
    """
    record = run.record
    if record.recipe_hash != recipe.hash():
        old, new = run.recipe.hashed(), recipe.hashed()
        changed = ", ".join(name for name in new if new[name] != old[name])
        raise UserError(
            f"{run}: its recipe has changed since it began (changed: {changed or 'its recipe.yaml'}).",
            "Restore the old files, or start a new run.",
        )
    if changes := environment_changes(run.path):
        warn(f"not the environment that the run began in, so the last digits may differ: {', '.join(changes)}")
    found, plans = checkpoint.latest(run.path, recipe.hash(), warn), record.plans
    if _without_budget(plan) != _without_budget(run.plan):
        if found:
            found.state.micro_batch_tokens = plan.micro_batch_tokens
            found.state.gradient_checkpointing = plan.gradient_checkpointing
        run.write_plan(plan)
        from_step = found.state.step + 1 if found else 1
        plans = [*plans, {"from_step": from_step} | plan.model_dump()]
    run.update(status="training", plans=plans)
    return found


def _without_budget(plan: Plan) -> Plan:
    """The plan without what the machine happened to have free."""
    return plan.model_copy(update={"memory_budget": 0})

"""Which plan: the fastest of those whose predicted memory fits the budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.backend import Adapter
from common.data.batching import START_COST, cut, step_rows
from common.data.encode import Encoded
from common.display import gigabytes
from common.errors import UserError
from common.options import Options, read_size
from common.recipe import Plan, Recipe
from common.system.hardware import free_memory
from common.training.memory_estimate import MemoryEstimate, MicroBatchShape, loss_chunk, predict

_SIZES = (8192, 4096, 2048, 1024, 512, 256, 1)  # micro-batches' tokens that are tried; the last: one row each
_RECOMPUTE = 1.4  # the time of a step with gradient checkpointing; measured 1.35 to 1.45 on a CPU, 1.32 on an H200
_WORTH = 1.02  # a dearer plan must be this much faster
_ROWS = 4000  # whose steps are looked at


@dataclass(frozen=True)
class ChosenPlan:
    plan: Plan
    prediction: MemoryEstimate
    budget: int
    why: str


@dataclass(frozen=True)
class Work:
    """The lengths and labels of the rows, step by step: what micro-batches are cut from."""

    steps: list[list[tuple[int, int]]]  # each step's rows, rising: (tokens, label tokens)
    worst: list[tuple[int, int]]  # the longest rows together, where not every step is looked at

    @staticmethod
    def of(rows: Sequence[Encoded], recipe: Recipe) -> "Work":
        sizes = [(len(row.ids) - 1, int(row.mask[1:].sum())) for row in rows]
        looked_at = min(recipe.steps, max(20, _ROWS // recipe.batch_size))
        chosen = [step_rows(len(rows), recipe.batch_size, recipe.seed, step) for step in range(1, looked_at + 1)]
        worst = sorted(sizes)[-recipe.batch_size :] if recipe.steps > looked_at else []
        return Work([sorted(sizes[i] for i in step) for step in chosen], worst)

    def cut(self, micro_batch_tokens: int, device: str = "cpu") -> tuple[list[MicroBatchShape], int, int]:
        """`(shapes of the micro-batches, tokens, micro-batches)`, of the steps that are looked at."""
        shapes: set[MicroBatchShape] = set()
        tokens, count = 0, 0
        for step in [*self.steps, self.worst]:
            cuts = cut([length for length, _ in step], micro_batch_tokens, device)
            for start, end in cuts:
                part = step[start:end]
                shapes.add(MicroBatchShape(len(part), part[-1][0], sum(t for t, _ in part), sum(n for _, n in part)))
            if step is not self.worst:
                tokens, count = tokens + sum(length for length, _ in step), count + len(cuts)
        return list(shapes), tokens, count


def choose(
    options: Options,
    recipe: Recipe,
    base: Plan,
    config: dict[str, Any],
    adapter: Adapter | None,
    rows: Sequence[Encoded],
) -> ChosenPlan:
    """The plan that `base` becomes: what the user typed stays. Raises UserError where --memory-limit cannot be kept."""
    budget, why = _budget(options, base)
    work = Work.of(rows, recipe)
    base = base.model_copy(update={"loss_chunk": loss_chunk(config, base), "memory_budget": budget})
    sizes = [options.micro_batch_tokens] if options.micro_batch_tokens else _SIZES
    ways = [False, True] if options.gradient_checkpointing is None else [options.gradient_checkpointing]
    found = []
    for size in sizes:
        shapes, tokens, count = work.cut(size, base.device)
        for again in ways:
            plan = base.model_copy(update={"micro_batch_tokens": size, "gradient_checkpointing": again})
            cost = (tokens + START_COST[plan.device] * count) * (_RECOMPUTE if again else 1)
            found.append((plan, predict(config, recipe, plan, adapter, shapes), cost))
    fitting = [candidate for candidate in found if candidate[1].peak <= budget]
    if not fitting:
        plan, prediction, _ = min(found, key=lambda candidate: candidate[1].peak)
        if options.memory_limit is not None:
            typed = options.micro_batch_tokens or options.gradient_checkpointing is False
            raise UserError(
                f"--memory-limit {options.memory_limit}: training needs about {gigabytes(prediction.peak)} at least.",
                ("Leave out --micro-batch-tokens and --gradient-checkpointing. " if typed else "")
                + "Raise the limit, lower --max-length or --rank, or hold the base in fewer bits: --quantization 4bit.",
            )
        return ChosenPlan(plan, prediction, budget, why)
    fastest = min(cost for _, _, cost in fitting)
    plan, prediction, _ = min(
        (candidate for candidate in fitting if candidate[2] <= fastest * _WORTH),
        key=lambda c: (c[1].peak, c[0].micro_batch_tokens),  # a smaller cut spares the validation memory too
    )
    return ChosenPlan(plan, prediction, budget, why)


def described(plan: Plan) -> str:
    return (
        f"micro-batches of up to {plan.micro_batch_tokens} tokens, logits of {plan.loss_chunk} labels at once"
        + (", gradient checkpointing" if plan.gradient_checkpointing else "")
        + f"; a checkpoint every {plan.save_every} steps"
    )


def _budget(options: Options, plan: Plan) -> tuple[int, str]:
    if options.memory_limit is not None:
        return read_size(options.memory_limit), "asked for"
    free, what = free_memory(plan.backend, plan.device)
    return round(0.85 * free), f"85 % of {what}, {gigabytes(free)}"


def largest(
    recipe: Recipe, plan: Plan, config: dict[str, Any], adapter: Adapter | None, longest: int, budget: int
) -> tuple[int, int]:
    """`(rows of `longest` tokens in one micro-batch, tokens of one row)` that fit at the most, with checkpointing."""
    lean = plan.model_copy(update={"gradient_checkpointing": True})

    def fits(rows: int, width: int) -> bool:
        return (
            predict(config, recipe, lean, adapter, [MicroBatchShape(rows, width, rows * width, rows * width)]).peak
            <= budget
        )

    def most(test: Any, limit: int) -> int:
        """By steps down and then halves: memory does not always rise with the tokens (`predict`'s gaps)."""
        above, low = limit + 1, limit
        while low and not test(low):
            above, low = low, low * 15 // 16
        while above - low > 1:
            middle = (low + above) // 2
            low, above = (middle, above) if test(middle) else (low, middle)
        return low

    return most(lambda n: fits(n, longest), 4096), most(lambda n: fits(1, n), config["max_position_embeddings"])

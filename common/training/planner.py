"""Which plan: the fastest of those whose estimated memory fits the budget."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from common.data.batching import START_COST, cut, deal, step_rows
from common.data.encode import Encoded
from common.data.encoded_rows import EncodedRows
from common.display import gigabytes
from common.errors import UserError
from common.memory_terms import MicroBatchShape
from common.options import Options, read_size
from common.recipe import Plan, Recipe
from common.training.memory_estimate import MemoryEstimate, TrainingMemory

_SIZES = (8192, 4096, 2048, 1024, 512, 256, 1)  # tokens of a micro-batch that are tried; the last: one row each
_RECOMPUTE = 1.4  # the time of a step with gradient checkpointing; measured 1.35 to 1.45 on a CPU, 1.32 on an H200
_WORTH = 1.02  # a plan that needs more memory must be this much faster
_ROWS = 4000  # rows whose steps are looked at


@dataclass(frozen=True)
class ChosenPlan:
    plan: Plan
    prediction: MemoryEstimate
    budget: int  # bytes
    why: str  # the budget's reason
    deterministic: bool  # the same training gives the same bits again


@dataclass(frozen=True)
class Work:
    """The lengths and labels of the rows, step by step: what micro-batches are cut from."""

    steps: list[list[tuple[int, int]]]  # each step's rows, rising: (tokens, label tokens)
    worst: list[tuple[int, int]]  # the longest rows together, where not every step is looked at
    validation: list[tuple[int, int]]  # the validation rows, rising

    @staticmethod
    def of(rows: Sequence[Encoded], recipe: Recipe, validation: Sequence[Encoded] = ()) -> "Work":
        (lengths, labels), held_out = _sizes(rows), sorted(zip(*_sizes(validation), strict=True))
        looked_at = min(recipe.steps, max(20, _ROWS // recipe.batch_size))
        chosen = [step_rows(len(rows), recipe.batch_size, recipe.seed, step) for step in range(1, looked_at + 1)]
        longest = np.lexsort((labels, lengths))[-recipe.batch_size :].tolist() * (recipe.steps > looked_at)
        steps = [sorted((lengths[i], labels[i]) for i in step) for step in [*chosen, longest]]
        return Work(steps[:-1], steps[-1], held_out)

    def cut(
        self, micro_batch_tokens: int, device: str = "cpu", ranks: int = 1
    ) -> tuple[Counter[MicroBatchShape], int, int]:
        """`(shapes of the micro-batches, tokens, micro-batches)`, of the steps that are looked at.

        tokens, micro-batches: of the rank that has most to do in each step.
        """
        shapes = Counter[MicroBatchShape]()
        tokens, count = 0, 0
        for step in [*self.steps, self.worst]:
            loads = []
            for dealt in deal([length for length, _ in step], ranks):
                rows = [step[number] for number in dealt]
                cuts = cut([length for length, _ in rows], micro_batch_tokens, device)
                shapes.update(_shape(rows[start:end]) for start, end in cuts)
                loads.append((sum(length for length, _ in rows), len(cuts)))
            if step is not self.worst:
                tokens, count = tokens + max(loads)[0], count + max(loads)[1]
        return shapes, tokens, count

    def shapes_of(self, steps: int, micro_batch_tokens: int, device: str, ranks: int = 1) -> Counter[MicroBatchShape]:
        """How many micro-batches of which shapes so many steps have, by those that are looked at."""
        return self.over(steps, self.cut(micro_batch_tokens, device, ranks)[0])

    def over(self, steps: int, shapes: Counter[MicroBatchShape]) -> Counter[MicroBatchShape]:
        """The shapes of so many steps, by those of the steps that are looked at."""
        share = steps / len(self.steps)
        return Counter({shape: round(count * share) for shape, count in shapes.items()})

    def expected(self, steps: int, plan: Plan, micro_batch_tokens: int) -> Counter[MicroBatchShape]:
        """What a backend is told to expect. On MLX's GPU a layout is to hold each validation row too."""
        shapes, row = self.shapes_of(steps, micro_batch_tokens, plan.device, plan.ranks), self.any_validation_row
        return shapes + Counter([row] if row and plan.device == "gpu" else [])

    @property
    def any_validation_row(self) -> MicroBatchShape | None:
        """The sizes that hold each validation row alone; None where there are none."""
        if not self.validation:
            return None
        longest = self.validation[-1][0]
        return MicroBatchShape(1, longest, longest, max(labels for _, labels in self.validation))

    def longest_validation(self, micro_batch_tokens: int) -> MicroBatchShape | None:
        """The micro-batch of the longest validation rows; None where there are none."""
        if not self.validation:
            return None
        return _shape(self.validation[-max(1, micro_batch_tokens // self.validation[-1][0]) :])


def _sizes(rows: Sequence[Encoded]) -> tuple[list[int], list[int]]:
    """`(tokens, label tokens)` of each row."""
    encoded = EncodedRows.of(rows)
    return (encoded.lengths - 1).tolist(), encoded.label_tokens.tolist()


def _shape(rows: list[tuple[int, int]]) -> MicroBatchShape:
    """Of a micro-batch of rows with such sizes, rising."""
    tokens, labels = (sum(column) for column in zip(*rows, strict=True))
    return MicroBatchShape(len(rows), rows[-1][0], tokens, labels)


@dataclass(frozen=True)
class _Candidate:
    plan: Plan
    prediction: MemoryEstimate
    cost: float  # the time of a step, in tokens

    @property
    def peak(self) -> int:
        return self.prediction.peak


def choose_plan(
    options: Options,
    memory: TrainingMemory,
    base: Plan,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded] = (),
    as_begun: bool = False,
) -> ChosenPlan:
    """`base` with micro-batches, checkpointing and loss chunk chosen; what the user typed stays.

    base: its memory budget counts where it has one. rows, validation: what is trained on, and validated on. as_begun:
    the plan is that of a run that is resumed, and was accepted. Raises UserError where --memory-limit cannot be kept.
    """
    _require_shardable(options, memory, base)
    budget, why = _budget(options, memory, base)
    deterministic = memory.package.is_deterministic(memory.dims, base.device, memory.recipe.precision)
    chunk = memory.package.memory_terms.loss_chunk(memory.dims.vocabulary, base.device)
    base = base.model_copy(update={"loss_chunk": chunk, "memory_budget": budget})
    candidates = _candidates(options, memory, base, Work.of(rows, memory.recipe, validation))
    chosen = _choose(candidates, budget)
    if chosen.peak > budget and options.memory_limit is not None and not as_begun:
        raise _too_small(options, chosen.peak)
    return ChosenPlan(chosen.plan, chosen.prediction, budget, why, deterministic)


def leaner_plan(memory: TrainingMemory, plan: Plan, work: Work) -> Plan | None:
    """What to train with in place of `plan`, which turned out not to fit its budget; None where nothing takes less."""
    candidates = [
        candidate
        for candidate in _candidates(Options(), memory, plan, work)
        if candidate.plan.sharded == plan.sharded
        and candidate.plan.micro_batch_tokens <= plan.micro_batch_tokens
        and candidate.plan.gradient_checkpointing >= plan.gradient_checkpointing
    ]
    chosen = _choose(candidates, plan.memory_budget)
    return chosen.plan if chosen.peak < prediction(memory, plan, work).peak else None


def prediction(memory: TrainingMemory, plan: Plan, work: Work) -> MemoryEstimate:
    """What `plan` will take at its peak."""
    shapes = work.shapes_of(memory.recipe.steps, plan.micro_batch_tokens, plan.device, plan.ranks)
    return memory.estimate(plan, shapes, _validation(memory, plan, work))


def _validation(memory: TrainingMemory, plan: Plan, work: Work) -> MicroBatchShape | None:
    """The largest micro-batch of a validation, where layouts of training's do not hold all but a longer row."""
    if memory.joins_layouts(plan):
        return work.any_validation_row
    return work.longest_validation(plan.micro_batch_tokens)


def _choose(candidates: Sequence[_Candidate], budget: int) -> _Candidate:
    """The fastest that fits; where none does, the one that takes least."""
    fitting = [candidate for candidate in candidates if candidate.peak <= budget]
    if not fitting:
        return min(candidates, key=lambda candidate: candidate.peak)
    fitting = [candidate for candidate in fitting if not candidate.plan.sharded] or fitting
    fastest = min(candidate.cost for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.cost <= fastest * _WORTH),
        key=lambda c: (c.peak, c.plan.micro_batch_tokens),  # smaller micro-batches spare the validation memory too
    )


def _candidates(options: Options, memory: TrainingMemory, base: Plan, work: Work) -> list[_Candidate]:
    one_row = memory.dims.plain  # is computed at a time, whatever the micro-batch
    sizes = [options.micro_batch_tokens] if options.micro_batch_tokens else _SIZES[-1:] if one_row else _SIZES
    checkpointing = [False, True] if options.gradient_checkpointing is None else [options.gradient_checkpointing]
    can_shard = base.ranks > 1 and not memory.package.memory_terms.unshardable(memory.dims, memory.recipe)
    sharded = [bool(options.shard)] if not can_shard or options.shard is not None else [False, True]
    found = []
    for size in sizes:
        shapes, tokens, count = work.cut(size, base.device, base.ranks)
        shapes = work.over(memory.recipe.steps, shapes)
        for recompute, shard in product(checkpointing, sharded):
            plan = base.model_copy(
                update={"micro_batch_tokens": size, "gradient_checkpointing": recompute, "sharded": shard}
            )
            cost = (tokens + START_COST[plan.device] * count) * (_RECOMPUTE if recompute else 1)
            prediction = memory.estimate(plan, shapes, _validation(memory, plan, work))
            found.append(_Candidate(plan, prediction, cost))
    return found


def _require_shardable(options: Options, memory: TrainingMemory, base: Plan) -> None:
    if not options.shard:
        return
    if base.ranks == 1:
        raise UserError("--shard: there is one device.", "Leave it out, or give several with --devices.")
    if why := memory.package.memory_terms.unshardable(memory.dims, memory.recipe):
        raise UserError(f"--shard: {why}.", "Leave it out.")


def _too_small(options: Options, least: int) -> UserError:
    typed = options.micro_batch_tokens or options.gradient_checkpointing is False
    return UserError(
        f"--memory-limit {options.memory_limit}: training needs about {gigabytes(least)} at least.",
        ("Leave out --micro-batch-tokens and --gradient-checkpointing. " if typed else "")
        + "Raise the limit, lower --max-length or --rank, or hold the base in fewer bits: --quantization 4bit.",
    )


def described(plan: Plan) -> str:
    return (
        f"micro-batches of up to {plan.micro_batch_tokens} tokens, logits of {plan.loss_chunk} labels at once"
        + (", gradient checkpointing" if plan.gradient_checkpointing else "")
        + (", each device holds a part of the model" if plan.sharded else "")
        + f"; a checkpoint every {plan.save_every} steps"
    )


def _budget(options: Options, memory: TrainingMemory, plan: Plan) -> tuple[int, str]:
    if options.memory_limit is not None:
        return read_size(options.memory_limit), "asked for"
    if plan.memory_budget:
        return plan.memory_budget, "as before"
    free, what = memory.package.free_memory(plan.device_name)
    return round(0.85 * free), f"85 % of {what}, {gigabytes(free)}"


def largest(memory: TrainingMemory, plan: Plan, longest: int, max_positions: int, budget: int) -> tuple[int, int]:
    """`(rows of `longest` tokens in one micro-batch, tokens of one row)` that fit at the most, with checkpointing.

    max_positions: the longest row that the model takes.
    """
    lean = plan.model_copy(update={"gradient_checkpointing": True})

    def fits(rows: int, width: int) -> bool:
        tokens = rows * width
        return memory.estimate(lean, [MicroBatchShape(rows, width, tokens, tokens)]).peak <= budget

    return _most(lambda rows: fits(rows, longest), 4096), _most(lambda width: fits(1, width), max_positions)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The most up to `limit` that fits, 0 where nothing does: by steps down, then by bisection.

    Not by bisection alone, since the estimate does not always rise with the tokens (torch's gaps between blocks).
    """
    above, low = limit + 1, limit
    while low and not fits(low):
        above, low = low, low * 15 // 16
    while above - low > 1:
        middle = (low + above) // 2
        low, above = (middle, above) if fits(middle) else (low, middle)
    return low

"""Several ranks behind one backend. Rank 0 trains as if it were alone, and the others do their part of what it does.

So what a training decides is decided once: where to cut finer, when to stop, which adapter is the best. What is told,
and what each rank then does, stands in `RankedBackend` and `follow`, method by method.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import (
    Adapter,
    Backend,
    Batch,
    Memory,
    ModelInfo,
    OptimizerState,
    OutOfMemory,
    StepResult,
    weight_sum,
)
from common.backend_package import RankPackage
from common.errors import AtOdds, UserError
from common.lazy_arrays import LazyArrays, shapes_of
from common.memory_terms import MicroBatchShape
from common.rank_backend import RankBackend
from common.recipe import Plan, Recipe
from common.sampling import Sampler, generate_tokens
from common.training.messages import (
    Message,
    adapter_of,
    adapter_parts,
    batch_arrays,
    batches_of,
)
from common.training.rank_shares import evened, share, with_rows
from common.training.ranks import Agreed, Ranks

_ELSEWHERE = "on another rank"


class RankedBackend:
    """Rank 0's. See `common.backend.Backend` for the contract of every method."""

    def __init__(self, local: RankBackend, ranks: Ranks) -> None:
        self.local, self.ranks = local, ranks
        self.peak, self.sharded = 0, False  # peak: bytes, of the rank that has taken most
        self.dequantized, self.cpu_threads = local.dequantized, local.cpu_threads
        self.expert_load = local.expert_load

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        values, arrays = adapter_parts(adapter) if adapter else (None, {})
        settings = {"recipe": recipe.content(), "plan": plan.model_dump(), "adapter": values}
        self.sharded = plan.sharded
        with self.ranks.together():
            self.ranks.tell("load", settings, arrays)
            return _load(self.local, self.ranks, recipe, plan, lambda: folder, adapter)

    def exchange(self, recipe: Recipe, plan: Plan, adapter: Adapter) -> None:
        raise NotImplementedError("one training after another over a loaded base is for one device")

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        found = shapes()
        self.ranks.tell("expect", {"shapes": [[*shape, count] for shape, count in found.items()]})
        self.local.expect(lambda: found)

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        weight = weight_sum(micro_batches)
        told = evened(micro_batches, self.ranks.group.size) if self.sharded else micro_batches
        values = {"step": step, "rate": learning_rate, "weight": weight, "ranks": [batch.rank for batch in told]}
        with self.ranks.together():
            self.ranks.tell("step", values, batch_arrays(told))
            loss, norm, padded, peak = _step(self.local, self.ranks, told, weight, learning_rate, step)
        self.peak = max(self.peak, peak)
        return StepResult.of(micro_batches, loss, norm, padded)

    def eval_step(self, batch: Batch) -> StepResult:
        told = with_rows(batch, self.ranks.group.size) if self.sharded else batch
        with self.ranks.together():
            self.ranks.tell("evaluate", {}, batch_arrays([told]))
            loss, padded = _evaluate(self.local, self.ranks, told)
        return StepResult.of([batch], loss, 0.0, padded)

    def get_adapter(self) -> Adapter:
        found = self.local.get_adapter()
        return replace(found, full=self._gathered("full", found.full)) if found.full else found

    def get_optimizer(self) -> OptimizerState:
        found = self.local.get_optimizer()
        moments = (self._gathered(part, getattr(found, part)) for part in ("exp_avg", "exp_avg_sq"))
        return OptimizerState(found.step, *moments)

    def _gathered(self, part: str, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The arrays, where each rank holds a part of every one: tensor by tensor."""
        if not self.sharded:
            return arrays

        def read(name: str) -> np.ndarray:
            with self.ranks.together():
                self.ranks.tell("gather", {"part": part, "name": name})
                return self.ranks.naming(lambda: arrays[name])

        return LazyArrays(shapes_of(arrays), read)

    def logits(self, token_ids: np.ndarray, adapter: bool = True, positions: np.ndarray | None = None) -> np.ndarray:
        if not self.sharded:
            return self.local.logits(token_ids, adapter, positions)
        kept = np.arange(len(token_ids)) if positions is None else np.asarray(positions)
        with self.ranks.together():
            self.ranks.tell("logits", {"adapter": adapter}, {"ids": np.asarray(token_ids), "positions": kept})
            return self.ranks.naming(lambda: self.local.logits(token_ids, adapter, kept))

    def generate(
        self,
        token_ids: np.ndarray,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        sampler: Sampler,
        adapter: bool = True,
    ) -> Iterator[int]:
        if not self.sharded:
            return self.local.generate(token_ids, max_new_tokens, stop_ids, sampler, adapter)
        row: list[int] = []

        def forward(ids: list[int], restart: bool) -> np.ndarray:  # without a cache, which would be sharded too
            row.extend(ids)
            found: np.ndarray = self.logits(np.array(row, np.int32), adapter, np.array([len(row) - 1]))[0]
            return found

        return generate_tokens(forward, token_ids, max_new_tokens, stop_ids, sampler, None)

    def set_adapter(self, adapter: Adapter) -> None:
        values, arrays = adapter_parts(adapter)
        with self.ranks.together():
            self.ranks.tell("adapter", {"adapter": values, "shapes": shapes_of(arrays)})
            self.local.set_adapter(adapter_of(values, self._telling(arrays)))

    def set_optimizer(self, state: OptimizerState) -> None:
        with self.ranks.together():
            self.ranks.tell("optimizer", {"step": state.step, "shapes": shapes_of(state.exp_avg)})
            moments = (self._telling(arrays) for arrays in (state.exp_avg, state.exp_avg_sq))
            self.local.set_optimizer(OptimizerState(state.step, *moments))

    def _telling(self, arrays: Mapping[str, np.ndarray]) -> LazyArrays:
        """The arrays, each told to the other ranks when it is read: no rank holds all of them for another."""

        def read(name: str) -> np.ndarray:
            array = arrays[name]
            self.ranks.tell("array", arrays={name: array})
            return array

        return LazyArrays(shapes_of(arrays), read)

    def memory(self) -> Memory:
        found = self.local.memory()
        return replace(found, peak=max(found.peak, self.peak))

    def apply_plan(self, plan: Plan) -> None:
        self.ranks.tell("plan", {"plan": plan.model_dump()})
        self.local.apply_plan(plan)

    def close(self) -> None:
        if not self.ranks.within:
            self.ranks.tell("close")
        self.local.close()


def follow(create: Callable[[], RankBackend], ranks: Ranks, base: Callable[[Recipe], Path]) -> None:
    """Do what rank 0 asks for, until it ends.

    base: gives the folder of the recipe's model on this machine; may raise UserError.
    """
    device = ranks.members[ranks.group.rank].device
    while (message := ranks.hear()).kind != "end":
        kind, values, arrays = message
        if kind == "load":
            recipe, plan = Recipe.model_validate(values["recipe"]), Plan.model_validate(values["plan"]).on(device)
            adapter = adapter_of(values["adapter"], arrays) if values["adapter"] else None
            backend = create()
            try:
                _load(backend, ranks, recipe, plan, partial(base, recipe), adapter)
            except Agreed:
                pass  # rank 0 says it, and ends
        elif kind == "close":
            backend.close()
        else:
            _do(message, backend, ranks, device)


def _do(message: Message, backend: RankBackend, ranks: Ranks, device: str) -> None:
    """What is asked of a backend that is loaded."""
    kind, values, arrays = message
    if kind == "step":
        micro_batches = batches_of(arrays, values["ranks"])
        with suppress(Agreed):  # rank 0 raises it too, and repeats the step or ends
            _step(backend, ranks, micro_batches, values["weight"], values["rate"], values["step"])
    elif kind == "evaluate":
        with suppress(Agreed):
            _evaluate(backend, ranks, *batches_of(arrays, [0]))
    elif kind == "expect":
        shapes = Counter({MicroBatchShape(*shape): count for *shape, count in values["shapes"]})
        backend.expect(lambda: shapes)
    elif kind == "logits":
        ranks.naming(lambda: backend.logits(arrays["ids"], values["adapter"], arrays["positions"]))
    elif kind == "gather":
        source = backend.get_adapter() if values["part"] == "full" else backend.get_optimizer()
        ranks.naming(lambda: getattr(source, values["part"])[values["name"]])
    elif kind == "adapter":
        backend.set_adapter(adapter_of(values["adapter"], _told(ranks, values["shapes"])))
    elif kind == "optimizer":
        moments = (_told(ranks, values["shapes"]) for _ in range(2))
        backend.set_optimizer(OptimizerState(values["step"], *moments))
    elif kind == "plan":
        backend.apply_plan(Plan.model_validate(values["plan"]).on(device))


def _told(ranks: Ranks, shapes: Mapping[str, list[int]]) -> LazyArrays:
    """What rank 0 tells array by array, in the order in which all ranks read them."""
    return LazyArrays({name: tuple(shape) for name, shape in shapes.items()}, lambda name: ranks.hear().arrays[name])


def _load(
    backend: RankBackend, ranks: Ranks, recipe: Recipe, plan: Plan, base: Callable[[], Path], adapter: Adapter | None
) -> ModelInfo:
    """Load on every rank. Raises Agreed, with the fault of the first that cannot."""
    fault, info = None, None
    try:
        info = backend.load(recipe, plan, base(), adapter)
    except UserError as error:
        fault = error
    ranks.agree(fault)
    if info is None:
        raise RuntimeError("a fault is not told")
    return info


def _step(
    backend: RankBackend, ranks: Ranks, micro_batches: Sequence[Batch], weight: float, rate: float, step: int
) -> tuple[Any, Any, int, int]:
    """`(loss, gradient norm, positions, peak memory)` of the step over all ranks, the peak of the one that takes most.

    Raises Agreed, with OutOfMemory or another fault, where one of them fails.
    """
    padded, fault = 0, None
    mine = [batch for batch in micro_batches if batch.rank == ranks.group.rank]
    try:
        padded = ranks.naming(lambda: backend.accumulate(mine, weight, step))
    except AtOdds:
        raise
    except UserError as error:
        fault = error
    found = ranks.gather(*_flags(fault), padded, backend.memory().peak)
    *failed, positions, _ = found.sum(axis=0)
    _agree(ranks, failed, fault)
    ranks.naming(backend.sum_gradients)
    return *ranks.naming(lambda: backend.apply_gradients(rate)), int(positions), int(found[:, 3].max())


def _evaluate(backend: RankBackend, ranks: Ranks, batch: Batch) -> tuple[float, int]:
    """`(loss, positions)` of a micro-batch whose rows the ranks share. Raises Agreed where one of them fails."""
    loss, padded, fault = 0.0, 0, None
    try:
        if mine := share(batch, ranks.group.rank, ranks.group.size):
            result = ranks.naming(partial(backend.eval_step, mine))
            loss, padded = float(result.loss_sum), result.padded_tokens
    except AtOdds:
        raise
    except UserError as error:
        fault = error
    *failed, loss, positions = ranks.gather(*_flags(fault), loss, padded).sum(axis=0)
    _agree(ranks, failed, fault)
    return float(loss), int(positions)


def _flags(fault: UserError | None) -> tuple[bool, bool]:
    """`(whether memory ran out, whether there is another fault)`"""
    return isinstance(fault, OutOfMemory), fault is not None and not isinstance(fault, OutOfMemory)


def _agree(ranks: Ranks, failed: Sequence[float], fault: UserError | None) -> None:
    """Raises Agreed on all ranks where one has failed. failed: how many by OutOfMemory, and otherwise."""
    short, otherwise = failed
    if otherwise:
        ranks.agree(None if isinstance(fault, OutOfMemory) else fault)
    if short:
        raise Agreed(fault or OutOfMemory(_ELSEWHERE))


class RankedPackage:
    """A package that makes a backend of all ranks, on rank 0. See `common.backend_package.BackendPackage`."""

    def __init__(self, package: RankPackage, ranks: Ranks) -> None:
        self._package, self._ranks = package, ranks
        self.memory_terms, self.fault, self.plain_layers = package.memory_terms, package.fault, package.plain_layers
        self.choose_device, self.choose_precision = package.choose_device, package.choose_precision
        self.quantization_scheme, self.is_deterministic = package.quantization_scheme, package.is_deterministic

    def create(self) -> Backend:
        return RankedBackend(self._package.create(), self._ranks)

    def free_memory(self, device: str) -> tuple[int, str]:
        """Of the rank that has least."""
        least = min(self._ranks.members, key=lambda member: member.free)
        return least.free, f"{least.what} of rank {least.rank}"

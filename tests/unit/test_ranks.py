"""Several ranks behind one backend: threads that train together, each with the smallest backend."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backend import Adapter, Batch, LoraWeight, ModelInfo, OptimizerState, OutOfMemory
from common.backend_package import Group
from common.data.batching import deal, micro_batches
from common.errors import AtOdds, RankLost, UserError
from common.lazy_arrays import LazyArrays, shapes_of
from common.recipe import Plan, Recipe
from common.training.checkpoint import State
from common.training.loop import TrainingLoop
from common.training.messages import adapter_of, adapter_parts, decoded, encoded
from common.training.ranked_backend import RankedBackend, RankedPackage, follow
from common.training.ranks import Ranks
from tests.backends import Quiet
from tests.unit.bigram import LAYER, Bigram, PartBigram, plan, recipe, rows


class Table:
    """What threads exchange: each puts its part there, and gets all parts when the last one has come."""

    def __init__(self, size: int) -> None:
        self.barrier, self.parts = threading.Barrier(size, timeout=20), [None] * size

    def exchange(self, rank: int, part: Any) -> list[Any]:
        try:
            self.parts[rank] = part
            self.barrier.wait()
            found = list(self.parts)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost("the table is gone") from None
        return found


class ThreadGroup:
    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.size = table, rank, table.barrier.parties

    def broadcast(self, data: bytes | None) -> bytes:
        return self.table.exchange(self.rank, data)[0]

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        found = self.table.exchange(self.rank, array.copy())
        assert len({(part.shape, part.dtype) for part in found}) == 1
        return found

    def close(self) -> None:
        self.table.barrier.abort()


class RankBigram(PartBigram):
    """fault: raised while it loads. odds: raised in a step."""

    def __init__(
        self,
        group: Group,
        memory_limit: int | None = None,
        fault: UserError | None = None,
        odds: AtOdds | None = None,
    ) -> None:
        super().__init__(memory_limit)
        self.group, self.fault, self.odds, self.evaluated = group, fault, odds, list[Batch]()
        self.given: list[int] = []  # micro-batches of each step

    def load(self, recipe: Recipe, plan: Plan, folder: Path, adapter: Adapter | None) -> ModelInfo:
        if self.fault:
            raise self.fault
        self.folder = folder
        return super().load(recipe, plan, folder, adapter)

    def accumulate(self, some: Sequence[Batch], weight: float, step: int) -> int:
        assert {batch.rank for batch in some} <= {self.group.rank}
        self.given.append(len(some))
        if self.odds:
            raise self.odds
        return super().accumulate([batch for batch in some if batch.loss_weights.any()], weight, step)

    def sum_gradients(self) -> None:
        self.loss = sum(self.group.gather(np.array(self.loss)))
        self.grads = {name: sum(self.group.gather(grad)) for name, grad in self.grads.items()}

    def eval_step(self, batch: Batch) -> Any:
        self.evaluated.append(batch)
        return super().eval_step(batch)


class Package:
    memory_terms = fault = choose_device = choose_precision = None
    quantization_scheme = is_deterministic = plain_layers = None

    def __init__(self, table: Table, rank: int, free: int = 1000, **backend: Any) -> None:
        self.group, self.free, self.backend = ThreadGroup(table, rank), free, backend

    def create(self) -> RankBigram:
        self.created = RankBigram(self.group, **self.backend)
        return self.created

    def join(self, device: str) -> ThreadGroup:
        return self.group

    def free_memory(self, device: str) -> tuple[int, str]:
        return self.free, "the free memory"


def with_others(
    work: Callable[[RankedPackage, Ranks], Any], others: Sequence[dict[str, Any]] = ({},), **first: Any
) -> tuple[Any, list[Package]]:
    """`(what rank 0's work returns, the packages of all ranks)`; the others follow until it ends."""
    table = Table(1 + len(others))
    packages = [Package(table, rank, **some) for rank, some in enumerate([first, *others])]

    def other(package: Package) -> None:
        try:
            follow(package.create, Ranks.join(package, "cpu"), lambda recipe: Path("elsewhere"))
        except (UserError, AssertionError) as error:
            package.ended = error
            package.group.close()

    threads = [threading.Thread(target=other, args=(package,), daemon=True) for package in packages[1:]]
    for thread in threads:
        thread.start()
    ranks = Ranks.join(packages[0], "cpu")
    result = work(RankedPackage(packages[0], ranks), ranks)
    if not table.barrier.broken:
        ranks.tell("end")
    for thread in threads:
        thread.join(timeout=20)
    return result, packages


def start() -> Adapter:
    random = np.random.default_rng(0)
    weight = LoraWeight(random.normal(size=(2, 6)).astype("float32"), np.zeros((6, 2), "float32"), 4.0)
    return Adapter("some/model", 1, 0.0, {LAYER: weight})


def trained(backend: Any, run: Path, ranks: int, **plans: Any) -> tuple[State, Adapter, Quiet]:
    run.mkdir()
    some, chosen, observer = recipe(), plan(ranks=ranks, **plans), Quiet()
    backend.load(some, chosen, Path("here"), start())
    state = State.before_training(chosen)
    loop = TrainingLoop(backend, some, chosen, rows(20, 1), rows(7, 2), run, state, observer)
    loop.train()
    adapter = backend.get_adapter()
    backend.close()
    return state, adapter, observer


@pytest.mark.parametrize("others", [1, 2, 5])
def test_the_number_of_ranks_changes_no_more_than_rounding(others: int, tmp_path: Path) -> None:
    expected, adapter, _ = trained(Bigram(), tmp_path / "alone", 1)

    def work(package: RankedPackage, ranks: Ranks) -> Any:
        return trained(package.create(), tmp_path / "together", 1 + others)

    (state, found, _), packages = with_others(work, [{}] * others)
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    assert state.best_valid_loss == pytest.approx(expected.best_valid_loss, rel=1e-6)
    assert (state.tokens, state.label_tokens) == (expected.tokens, expected.label_tokens)
    for name, array in adapter.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, atol=1e-6)
    for package in packages[1:]:  # all have the same bits
        for name, array in found.arrays().items():
            assert np.array_equal(package.created.parameters[name], array)
        assert package.created.folder == Path("elsewhere")
        assert package.created.closed
    worked = [sum(len(batch.lengths) for call in p.created.calls for batch in call) for p in packages]
    assert min(worked) > 0


def test_of_a_sharded_model_all_ranks_compute_as_many_micro_batches(tmp_path: Path) -> None:
    expected, adapter, _ = trained(Bigram(), tmp_path / "alone", 1)

    def work(package: RankedPackage, ranks: Ranks) -> Any:
        return trained(package.create(), tmp_path / "together", 5, sharded=True, micro_batch_tokens=12)

    (state, found, _), packages = with_others(work, [{}] * 4)
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)
    assert state.best_valid_loss == pytest.approx(expected.best_valid_loss, rel=1e-6)
    assert (state.tokens, state.label_tokens) == (expected.tokens, expected.label_tokens)
    for name, array in adapter.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, atol=1e-6)
    backends = [package.created for package in packages]
    assert len({tuple(backend.given) for backend in backends}) == 1
    assert len({len(backend.evaluated) for backend in backends}) == 1
    assert min(backend.computed[0] for backend in backends) == 0  # one had nothing but an empty row


@pytest.mark.slow
def test_ranks_that_are_at_odds_end(tmp_path: Path) -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        with pytest.raises(RankLost):
            trained(package.create(), tmp_path / "run", 2, sharded=True)
        return ranks.within

    fault = AtOdds("Memory ran out.", "Continue with --resume RUN.")
    within, packages = with_others(work, [{"odds": fault}])
    assert packages[1].ended is fault
    assert within  # so nothing more is told


def test_of_a_sharded_model_arrays_are_gathered_one_by_one() -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        backend = package.create()
        backend.load(recipe(), plan(ranks=2, sharded=True), Path("here"), start())
        asked, tell = [], ranks.tell
        ranks.tell = lambda kind, values=None, arrays=None: (asked.append((kind, values)), tell(kind, values, arrays))
        moments = backend.get_optimizer().exp_avg_sq
        assert shapes_of(moments) == shapes_of(start().arrays())
        assert asked == []
        assert not moments[f"{LAYER}.lora_A"].any()
        return list(asked)

    asked, _ = with_others(work)
    assert asked == [("gather", {"part": "exp_avg_sq", "name": f"{LAYER}.lora_A"})]


def test_what_ranks_are_given_is_told_array_by_array() -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        backend = package.create()
        backend.load(recipe(), plan(ranks=2), Path("here"), start())
        told, tell = [], ranks.tell
        ranks.tell = lambda kind, values=None, arrays=None: (
            told.append([kind, *(arrays or ())]),
            tell(kind, values, arrays),
        )
        moments = [{name: array + more for name, array in start().arrays().items()} for more in (1, 2)]
        backend.set_adapter(start().with_arrays(moments[0]))
        backend.set_optimizer(OptimizerState(7, *moments))
        return list(told), moments

    (told, moments), packages = with_others(work)
    names = list(moments[0])
    told_once = [["array", name] for name in names]
    assert told == [["adapter"], *told_once, ["optimizer"], *told_once, *told_once]
    for package in packages:
        state = package.created.get_optimizer()
        assert state.step == 7
        for found, given in zip((state.exp_avg, state.exp_avg_sq), moments, strict=True):
            assert all(np.array_equal(found[name], given[name]) for name in names)
        assert np.array_equal(package.created.get_adapter().weights[LAYER].A, moments[0][f"{LAYER}.lora_A"])


@pytest.mark.slow
def test_weights_that_cannot_be_read_to_their_end_leave_the_ranks_at_odds() -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        backend = package.create()
        backend.load(recipe(), plan(ranks=2), Path("here"), start())

        def read(name: str) -> np.ndarray:
            raise OSError("the disk is gone")

        broken = OptimizerState(1, *(LazyArrays(shapes_of(start().arrays()), read) for _ in range(2)))
        with pytest.raises(AtOdds, match="the disk is gone"):  # which nothing optional passes over
            backend.set_optimizer(broken)
        ranks.group.close()
        return ranks.within

    within, _ = with_others(work)
    assert within


def test_the_rows_of_a_validation_are_shared(tmp_path: Path) -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        return trained(package.create(), tmp_path / "run", 2, micro_batch_tokens=1000)

    _, packages = with_others(work)
    evaluated = [sum(len(batch.lengths) for batch in package.created.evaluated) for package in packages]
    assert evaluated[0] + evaluated[1] == 7 * 3  # before the first step, after steps 4 and 8
    assert abs(evaluated[0] - evaluated[1]) <= 3


def test_memory_that_runs_out_on_one_rank_cuts_finer_on_all(tmp_path: Path) -> None:
    expected, _, _ = trained(Bigram(), tmp_path / "alone", 1)

    def work(package: RankedPackage, ranks: Ranks) -> Any:
        return trained(package.create(), tmp_path / "together", 2)

    (state, _, observer), _ = with_others(work, [{"memory_limit": 15}])
    assert "ran out of memory" in " ".join(observer.warnings)
    assert state.micro_batch_tokens <= 15
    assert state.train_loss == pytest.approx(expected.train_loss, rel=1e-6)


def test_a_fault_of_another_rank_is_told_by_its_name(tmp_path: Path) -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        with pytest.raises(UserError) as caught:
            trained(package.create(), tmp_path / "run", 2)
        return caught.value

    fault = UserError("some/model is another model here than on rank 0.", "Give all machines the same model.")
    error, _ = with_others(work, [{"fault": fault}])
    assert error.what.startswith(f"rank 1 (process {os.getpid()} on ")
    assert error.what.endswith("): some/model is another model here than on rank 0.")
    assert error.fix == "Give all machines the same model."


def test_the_rank_with_least_memory_counts_and_ranks_of_one_device_share_it() -> None:
    (free, what), _ = with_others(lambda package, ranks: package.free_memory("cpu"), [{"free": 600}], free=900)
    assert (free, what) == (300, "the free memory of rank 1")


def test_a_rank_that_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        calls: list[int] = []  # a killed process counts as running for a moment
        monkeypatch.setattr("common.training.ranks._runs", lambda pid: calls.append(pid) or len(calls) <= 4)
        ranks.group.close()
        with pytest.raises(RankLost, match=r"rank 0 \(process \d+ on .*\), rank 1 .* has ended"):
            ranks.tell("step")

    with_others(work)


def test_rows_are_dealt_by_their_tokens() -> None:
    lengths = [1, 2, 3, 4, 10]
    assert deal(lengths, 2) == [[4], [0, 1, 2, 3]]
    assert deal(lengths, 1) == [[0, 1, 2, 3, 4]]
    assert deal([5], 3) == [[0], [], []]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_each_row_is_computed_by_one_rank(ranks: int) -> None:
    some = rows(30, 5)
    batches = micro_batches(some, 40, "cpu", ranks)
    found = sorted(tuple(batch.input_ids[i, :n]) for batch in batches for i, n in enumerate(batch.lengths))
    assert found == sorted(tuple(row.ids[:-1]) for row in some)
    loads = [sum(batch.tokens for batch in batches if batch.rank == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(len(row.ids) for row in some)


def test_a_message_keeps_what_it_holds() -> None:
    kind, values, arrays = decoded(encoded("step", {"rate": 1e-3, "text": "日本"}, {"a": np.eye(3, dtype="float32").T}))
    assert (kind, values) == ("step", {"rate": 1e-3, "text": "日本"})
    assert np.array_equal(arrays["a"], np.eye(3))
    adapter = start()
    values, arrays = adapter_parts(adapter)
    again = adapter_of(values, arrays)
    assert again.weights[LAYER].alpha == 4.0
    assert again.arrays().keys() == adapter.arrays().keys()
    full = Adapter("some/model", 2, 0.0, {}, {"w.weight": np.ones(3, "float32")})
    assert np.array_equal(adapter_of(*adapter_parts(full)).full["w.weight"], np.ones(3))


def test_memory_that_runs_out_in_a_validation_is_raised_on_rank_0() -> None:
    def work(package: RankedPackage, ranks: Ranks) -> Any:
        backend = package.create()
        assert isinstance(backend, RankedBackend)
        backend.load(recipe(), plan(ranks=2), Path("here"), start())
        (batch,) = micro_batches(rows(4, 3), 1000)
        with pytest.raises(OutOfMemory):
            backend.eval_step(batch)

    with_others(work, [{"memory_limit": 3}])

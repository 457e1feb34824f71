"""What runs teach the estimate of memory, and where it is kept."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.backend import Memory
from common.data.batching import step_rows
from common.memory_terms import MeasuredTerms, MicroBatchShape, StepMemory
from common.models.lora_init import initial_adapter
from common.recipe import Plan, Recipe
from common.training import checkpoint, learned_memory
from common.training.checkpoint import State
from common.training.forecast import Forecast
from common.training.learned_memory import LearnedMemory, Observation, forget, keep, observations, summary
from common.training.loop import Interrupted, TrainingLoop
from common.training.memory_estimate import TrainingMemory
from tests.unit.bigram import LAYER, Bigram, plan, recipe, row
from tests.unit.test_loop import TRAIN, Watch, metrics
from tests.unit.test_planner import MEMORY, PLAN, USUAL
from tests.unit.test_planner import recipe as planned_recipe

MB = 10**6
STEPS: dict[str, int] = {}  # other fields of the recipe
NOTHING = LearnedMemory("torch cpu", "v1", "model")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where observations are kept for the time of a test."""
    path = tmp_path / "cache" / "memory.jsonl"
    monkeypatch.setenv("TWINTUNE_LEARN_MEMORY", str(path))
    return path


def seen(fixed: int, step: int, peak: int, model: str = "model", recomputes: bool = False) -> Observation:
    return replace(NOTHING, model=model).observation(recomputes, fixed, step, peak)


def learned(*some: Observation) -> LearnedMemory:
    return replace(NOTHING, observations=some)


def test_nothing_learned_corrects_nothing() -> None:
    assert NOTHING.correction(False, 400 * MB, 600 * MB) == 0
    assert learned(seen(400 * MB, 600 * MB, 1000 * MB)).correction(False, 400 * MB, 600 * MB) == 0


@pytest.mark.parametrize("peak", [800, 950, 1300])
def test_the_same_training_again_is_estimated_as_it_was(peak: int) -> None:
    found = learned(seen(400 * MB, 600 * MB, peak * MB)).correction(False, 400 * MB, 600 * MB)
    assert 1000 * MB + found == pytest.approx(peak * MB, rel=0.01)


@pytest.mark.parametrize(("a", "b"), [(60, 0.2), (-40, 0.1), (100, -0.15)])
def test_two_sizes_tell_what_is_fixed_from_what_grows(a: int, b: float) -> None:
    """Planted: libraries take `a` MB more than estimated, and a micro-batch's part is wrong by the share `b`."""
    some = [seen(400 * MB, step * MB, round((400 + a + (1 + b) * step) * MB)) for step in (200, 900)]
    for step in (100, 500, 1500):
        true = 400 + a + (1 + b) * step
        estimated = 400 + step + learned(*some).correction(False, 400 * MB, step * MB) / MB
        assert estimated == pytest.approx(true, rel=0.02)


def test_another_model_counts_less_and_a_newer_run_more() -> None:
    own, other = seen(400 * MB, 600 * MB, 1000 * MB), seen(400 * MB, 600 * MB, 1300 * MB, model="other")
    of_both = learned(other, own).correction(False, 400 * MB, 600 * MB)
    assert 0 < of_both < 30 * MB
    assert learned(other).correction(False, 400 * MB, 600 * MB) > 200 * MB
    older = seen(400 * MB, 600 * MB, 1300 * MB)
    first, last = (learned(*some).correction(False, 400 * MB, 600 * MB) for some in ((older, own), (own, older)))
    assert first < 150 * MB < last


def test_checkpointing_shares_what_is_fixed_and_not_what_grows() -> None:
    found = learned(seen(400 * MB, 600 * MB, 1300 * MB, recomputes=True))
    assert found.correction(True, 400 * MB, 600 * MB) > 200 * MB
    assert 10 * MB < found.correction(False, 400 * MB, 600 * MB) < 100 * MB
    assert found.correction(False, 400 * MB, 900 * MB) == found.correction(False, 400 * MB, 600 * MB)


def test_runs_of_another_model_do_not_age_those_of_the_same() -> None:
    own, other = seen(400 * MB, 600 * MB, 1200 * MB), seen(400 * MB, 600 * MB, 1000 * MB, model="other")
    for count in (1, 5, 20):
        found = learned(own, *[other] * count).correction(False, 400 * MB, 600 * MB)
        assert 1000 * MB + found == pytest.approx(1200 * MB, rel=0.05)


def test_no_observation_halves_an_estimate_more_than_once() -> None:
    assert learned(seen(400 * MB, 600 * MB, 100 * MB)).correction(False, 400 * MB, 600 * MB) == -500 * MB


def test_an_estimate_names_what_was_learned_as_a_part() -> None:
    plain = MEMORY.estimate(PLAN, [USUAL])
    assert (plain.fixed + plain.step, "learned" in plain.parts) == (plain.peak, False)
    seen_now = MEMORY.observed(PLAN, [USUAL], None, plain.peak + 30 * MB)
    corrected = MEMORY.corrected(seen_now).estimate(PLAN, [USUAL])
    assert corrected.peak == pytest.approx(plain.peak + 30 * MB, rel=0.01)
    assert corrected.parts["learned"] == corrected.peak - plain.peak
    assert (corrected.fixed, corrected.step) == (plain.fixed, plain.step)


# --- kept


def test_only_the_same_kind_of_training_learns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MEMORY.with_learned(PLAN)
    keep(memory.observed(PLAN, [USUAL], None, memory.estimate(PLAN, [USUAL]).peak + 30 * MB))

    def parts(**changes: object) -> set[str]:
        some = replace(MEMORY, recipe=planned_recipe(**changes))
        return set(some.with_learned(PLAN).estimate(PLAN, [USUAL]).parts)

    assert "learned" in parts()
    assert "learned" in parts(learning_rate=0.1, rank=4, batch_size=2)
    assert "learned" not in parts(precision="bf16") | parts(dropout=0.1) | parts(method="dora")
    monkeypatch.setattr("common.training.memory_estimate.chip", lambda: "another processor")
    assert "learned" not in parts()


def test_what_one_card_teaches_holds_for_another_of_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = ["NVIDIA H200", "NVIDIA H200 NVL"]
    gpus = [SimpleNamespace(name=cards[number]) for number in (0, 0, 1)]
    monkeypatch.setattr("common.training.memory_estimate.nvidia_gpus", lambda: gpus)
    order = {"cuda": cards[0], "cuda:0": cards[0], "cuda:1": cards[0], "cuda:2": cards[1]}
    choose: Any = lambda wanted, device: SimpleNamespace(why=f"{order[device]} is Ampere or later")  # noqa: E731
    package: Any = SimpleNamespace(memory_terms=MEMORY.package.memory_terms, choose_precision=choose)
    memory = replace(MEMORY, package=package)
    first = memory.with_learned(PLAN.on("cuda:0"))
    keep(first.observed(PLAN.on("cuda:0"), [USUAL], None, 10**9))
    found = {device: bool(memory.with_learned(PLAN.on(device)).learned.observations) for device in order}
    assert found == {"cuda": True, "cuda:0": True, "cuda:1": True, "cuda:2": False}
    gpus.pop()  # without the other card
    assert memory.with_learned(PLAN.on("cuda:1")).learned.observations


def test_a_changed_estimate_starts_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MEMORY.with_learned(PLAN)
    keep(memory.observed(PLAN, [USUAL], None, 10**9))
    assert MEMORY.with_learned(PLAN).learned.observations
    monkeypatch.setattr("common.training.memory_estimate.inspect.getsource", lambda module: "other terms")
    assert not MEMORY.with_learned(PLAN).learned.observations


def test_a_damaged_file_is_passed_over_and_the_next_run_writes_it(file: Path) -> None:
    assert observations() == []
    file.parent.mkdir()
    file.write_bytes(b'\xff\xfe{"kind": 3}\n[]\n{"kind": "x"}\n')
    for peak in (0, -5, 10**400):
        with file.open("a") as more:
            more.write(seen(1, 2, 3).model_dump_json().replace('"peak":3', f'"peak":{peak}') + "\n")
    assert observations() == []
    keep(seen(1, 2, 3))
    keep(seen(1, 2, 4))
    with file.open("a") as more:
        more.write('{"kind": "cut')
    assert [one.peak for one in observations()] == [3, 4]


def test_the_file_does_not_grow_for_ever(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_memory, "_KEPT", 3)
    for peak in range(1, 6):
        keep(seen(1, 2, peak))
    assert [one.peak for one in observations()] == [3, 4, 5]


def test_what_was_learned_is_summed_up_and_forgotten(file: Path) -> None:
    assert summary([]) == ""
    keep(seen(1, 2, 3).model_copy(update={"date": "2026-01-02"}))
    keep(seen(1, 2, 3).model_copy(update={"date": "2026-01-01"}))
    assert summary(observations()) == "learned on this machine from 2 runs, the last on 2026-01-02"
    assert len(forget()) == 2
    assert (observations(), forget(), file.exists()) == ([], [], False)


def test_it_can_be_switched_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(seen(1, 2, 3))
    monkeypatch.setenv("TWINTUNE_LEARN_MEMORY", "0")
    keep(seen(1, 2, 4))
    assert observations() == []
    monkeypatch.setenv("TWINTUNE_LEARN_MEMORY", str(file))
    assert [one.peak for one in observations()] == [3]


# --- by the first steps


class Terms:
    """An estimate of 1 MB for each position of a micro-batch, with checkpointing 0.2 MB, over 10 MB of weights."""

    @staticmethod
    def step_memory(dims: object, recipe: Recipe, plan: Plan, shape: MicroBatchShape) -> StepMemory:
        return StepMemory(shape.rows * shape.width * (0.2 if plan.gradient_checkpointing else 1.0) * MB, 0, 0)

    @staticmethod
    def measured(device: str, precision: str, tokens: object) -> MeasuredTerms:
        return MeasuredTerms(0, 0.0, True)

    held_bytes = staticmethod(lambda dims, recipe, device: 10 * MB)
    adapter_copies = staticmethod(lambda recipe, device: 1)
    update_copies = staticmethod(lambda recipe, device: 0.0)
    loading_bytes = staticmethod(lambda dims, recipe: 0)


class Hungry(Bigram):
    """Takes `times` as much for a micro-batch as estimated."""

    times, peak = 1.0, 0.0

    def memory(self) -> Memory:
        share = 0.2 if self.plan.gradient_checkpointing else 1.0
        largest = max((batch.input_ids.size for batches in self.calls[-1:] for batch in batches), default=0)
        self.peak = max(self.peak, (10 + self.times * share * largest) * MB)
        return Memory(1, round(self.peak), 10**10, "rss", 0)


def trained(
    folder: Path, times: float, budget: int, stop: int = 0, replans: bool = True, kind: type[Hungry] | None = None
) -> tuple[State, Hungry, Watch, Observation | None]:
    """A run of twelve steps with `budget` MB, stopped after step `stop` and resumed where that is not 0."""
    folder.mkdir(exist_ok=True)
    chosen, the_plan = (
        recipe(**{"steps": 12, "eval_every": 100, **STEPS}),
        plan(memory_budget=budget * MB, save_every=100),
    )
    package: Any = SimpleNamespace(memory_terms=Terms)
    estimate = TrainingMemory(package, MEMORY.dims, chosen, None)
    for watch in [Watch(stop), Watch()] if stop else [Watch()]:
        backend = (kind or Hungry)()
        backend.times = times
        backend.load(chosen, the_plan, folder, initial_adapter({LAYER: (6, 6)}, 1, chosen))
        found, state = checkpoint.latest(folder), State.before_training(the_plan)
        forecast = Forecast(None if found else estimate, replans)
        if found:
            state, adapter, optimizer = found
            backend.set_adapter(adapter)
            backend.set_optimizer(optimizer)
        with suppress(Interrupted):
            TrainingLoop(backend, chosen, the_plan, TRAIN, [], folder, state, watch, forecast=forecast).train()
    return state, backend, watch, forecast.observation(backend.memory().peak)


@pytest.fixture(autouse=True)
def _no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.training.memory_estimate.training_state_bytes", lambda adapter, dims: (0, 0))


def test_where_the_estimate_holds_the_first_steps_say_nothing(tmp_path: Path) -> None:
    state, backend, watch, seen = trained(tmp_path / "run", 1.0, 100)
    assert (watch.said, watch.warnings, state.micro_batch_tokens) == ([], [], 64)
    assert seen is not None
    assert seen.fixed + seen.step == seen.peak == backend.peak


def test_an_estimate_that_is_off_is_corrected_in_a_line(tmp_path: Path) -> None:
    state, backend, watch, _ = trained(tmp_path / "run", 1.5, 1000)
    (said,) = watch.said
    assert said.startswith("memory: estimated ")
    assert said.endswith(" MB by the peak of 3 steps")
    before, now = (float(found) for found in re.findall(r"([\d.]+) MB", said))
    assert now == pytest.approx(backend.peak / MB, rel=0.1)
    assert now > before + 10
    assert (watch.warnings, state.micro_batch_tokens) == ([], 64)


def test_where_the_rest_would_not_fit_the_plan_is_changed_and_the_curve_is_not(tmp_path: Path) -> None:
    plain, *_ = trained(tmp_path / "plain", 1.0, 1000)
    state, backend, watch, seen = trained(tmp_path / "run", 1.5, 72)
    (warning,) = watch.warnings
    assert re.search(r"estimated [\d.]+ MB, now [\d.]+ MB by .*, and 72.0 MB may be taken; ", warning)
    assert state.gradient_checkpointing or state.micro_batch_tokens < plain.micro_batch_tokens
    taken = 10 + 1.5 * (0.2 if state.gradient_checkpointing else 1.0) * max(
        batch.input_ids.size for batches in backend.calls[-4:] for batch in batches
    )
    assert taken <= 72
    left_out = ("seconds", "memory")
    assert metrics(tmp_path / "run", *left_out) == metrics(tmp_path / "plain", *left_out)
    assert seen is not None  # of the plan that was given up: that is what the next run is to know
    assert (seen.recomputes, seen.peak > seen.fixed + seen.step) == (False, True)


def test_what_the_user_has_set_is_not_changed(tmp_path: Path) -> None:
    state, _, watch, _ = trained(tmp_path / "run", 1.5, 72, replans=False)
    assert (state.micro_batch_tokens, state.gradient_checkpointing, watch.warnings) == (64, False, [])
    assert watch.said[0].startswith("memory: estimated ")


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_keeps_the_changed_plan(tmp_path: Path, stop: int) -> None:
    whole, backend, *_ = trained(tmp_path / "whole", 1.5, 72)
    state, again, watch, seen = trained(tmp_path / "stopped", 1.5, 72, stop=stop)
    assert (watch.warnings, seen) == ([], None)
    assert (state.micro_batch_tokens, state.gradient_checkpointing) == (
        whole.micro_batch_tokens,
        whole.gradient_checkpointing,
    )
    steps = 12 - stop
    shapes = [[batch.input_ids.shape for batch in batches] for batches in backend.calls[-steps:]]
    assert [[batch.input_ids.shape for batch in batches] for batches in again.calls] == shapes


def test_a_longer_row_in_the_step_after_is_not_taken_for_an_error(tmp_path: Path, monkeypatch) -> None:
    """The step after the third has not begun when the peak is read."""
    order = [step_rows(8, 2, recipe().seed, step) for step in range(1, 5)]
    longest = next(i for i in order[3] if i not in [*order[0], *order[1], *order[2]])
    rows = [row([1] * (60 if i == longest else 9), 1) for i in range(8)]
    monkeypatch.setattr("tests.unit.test_learned_memory.TRAIN", rows)
    monkeypatch.setattr("tests.unit.test_learned_memory.STEPS", {"batch_size": 2, "steps": 4})
    state, _, watch, _ = trained(tmp_path / "run", 1.0, 75)
    assert (watch.said, watch.warnings, state.micro_batch_tokens) == ([], [], 64)


def test_a_plan_that_changed_for_other_reasons_teaches_nothing(tmp_path: Path) -> None:
    class Short(Hungry):
        def __init__(self) -> None:
            super().__init__(memory_limit=20)

    state, *_, seen = trained(tmp_path / "run", 1.0, 1000, kind=Short)
    assert state.micro_batch_tokens < 64
    assert seen is None

"""The training loop, driven by a softmax regression in numpy."""

import json
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common import files
from common.backend import Adapter, Batch, Memory, OutOfMemory, StepResult, weight_sum
from common.data.batching import make_batch, micro_batches, step_rows
from common.data.encode import Encoded
from common.errors import UserError
from common.memory_terms import MicroBatchShape
from common.models.lora_init import initial_adapter
from common.recipe import Parent, Plan, Recipe
from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted, TrainingLoop
from common.training.metrics import Metrics
from common.training.planner import Work
from common.training.schedule import learning_rate
from common.training.validation import evaluate, worse_than_start
from tests.full_disk import full_disk
from tests.unit.bigram import LAYER, Bigram, plan, recipe, row, rows

TRAIN, VALID = rows(14, seed=1), rows(5, seed=2)


class Watch:
    """Notes what the loop tells; asks it to stop after step `stop_after`."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after = stop_after
        self.steps: list[dict] = []
        self.evaluations: list[dict] = []
        self.warnings: list[str] = []
        self.said: list[str] = []

    def step(self, line: dict, memory: Memory) -> None:
        self.steps.append(line)

    def evaluation(self, line: dict) -> None:
        self.evaluations.append(line)

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def stop_requested(self) -> bool:
        return len(self.steps) == self.stop_after - 1  # a step is reported while the next one runs


def run(
    folder: Path,
    backend: Bigram | None = None,
    watch: Watch | None = None,
    the_recipe: Recipe | None = None,
    the_plan: Plan | None = None,
    valid: list[Encoded] | None = None,
    resume: bool = False,
) -> tuple[State, Bigram]:
    """One process's part of a run: a new backend, started afresh or from the newest checkpoint."""
    folder.mkdir(exist_ok=True)
    backend, chosen, the_plan = backend or Bigram(), the_recipe or recipe(), the_plan or plan()
    backend.load(chosen, the_plan, folder, initial_adapter({LAYER: (6, 6)}, 1, chosen))
    found = checkpoint.latest(folder) if resume else None
    if found:
        state, adapter, optimizer = found
        backend.set_adapter(adapter)
        backend.set_optimizer(optimizer)
    else:
        state = State(micro_batch_tokens=the_plan.micro_batch_tokens)
    held_out = VALID if valid is None else valid
    TrainingLoop(backend, chosen, the_plan, TRAIN, held_out, folder, state, watch or Watch()).train()
    return state, backend


def metrics(folder: Path, *dropped: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["step"]]  # without the validation before the first step
    return [{key: value for key, value in line.items() if key not in dropped} for line in lines]


def same(one: Adapter, other: Adapter) -> bool:
    return all(
        np.array_equal(getattr(one.weights[LAYER], part), getattr(other.weights[LAYER], part)) for part in ("A", "B")
    )


# --- the schedule


def rates(**changes: object) -> list[float]:
    chosen = recipe(learning_rate=1.0, **changes)
    return [round(learning_rate(chosen, step), 6) for step in range(1, chosen.steps + 1)]


def test_the_warm_up_rises_in_equal_parts_to_the_whole_rate() -> None:
    assert rates(schedule="constant", steps=6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_linear_schedule_falls_in_equal_parts_and_not_to_zero() -> None:
    assert rates(schedule="linear", steps=6, warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_the_cosine_schedule() -> None:
    half = 0.5 * (1 + math.cos(math.pi / 4))
    expected = [1.0, round(half, 6), 0.5, round(1 - half, 6)]
    assert rates(schedule="cosine", steps=4, warmup_steps=0) == expected


def test_a_warm_up_over_all_steps() -> None:
    assert rates(schedule="cosine", steps=2, warmup_steps=2) == [0.5, 1.0]


# --- the loss


def test_the_first_loss_is_that_of_an_even_guess(tmp_path: Path) -> None:
    run(tmp_path)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(math.log(6), abs=1e-7)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run(tmp_path, the_recipe=recipe(steps=60, learning_rate=0.2))
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_is_the_sum_over_label_tokens_by_their_count(tmp_path: Path) -> None:
    backend = Bigram()
    run(tmp_path, backend, the_recipe=recipe(steps=1), valid=[])
    (batches,) = backend.calls
    assert metrics(tmp_path, "seconds", "grad_norm") == [
        {
            "step": 1,
            "loss": metrics(tmp_path)[0]["loss"],
            "label_tokens": sum(batch.label_tokens for batch in batches),
            "tokens": sum(batch.tokens for batch in batches),
            "learning_rate": 0.025,
            "memory": 1,
            "swap": 0,
        }
    ]


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_the_cut_changes_nothing_but_the_padding(tmp_path: Path, budget: int) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", the_plan=plan(micro_batch_tokens=budget))
    left_out = ("seconds", "valid_loss")
    assert metrics(tmp_path / "a", *left_out) == metrics(tmp_path / "b", *left_out)
    valid = [[line["valid_loss"] for line in metrics(tmp_path / name) if "valid_loss" in line] for name in "ab"]
    assert valid[0] == pytest.approx(valid[1], rel=1e-12)


def test_evaluate_is_the_mean_over_label_tokens_and_not_over_rows() -> None:
    class Fixed(Bigram):
        def eval_step(self, batch: Batch) -> StepResult:  # a row's tokens cost what its first id says
            cost = sum(int(ids[0]) * weights.sum() for ids, weights in zip(*astuple(batch), strict=True))
            return StepResult.of([batch], cost, 0.0, 0)

    def astuple(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        return batch.input_ids, batch.loss_weights

    two = [row([1, 9, 9, 9], 3), row([5, 9], 1)]
    for size in (1, 100):
        assert evaluate(Fixed(), micro_batches(two, size)) == (3 * 1 + 1 * 5) / 4


def test_evaluate_weighs_tokens() -> None:
    class Fixed(Bigram):
        def eval_step(self, batch: Batch) -> StepResult:
            return StepResult.of([batch], float((batch.input_ids[:, :1] * batch.loss_weights).sum()), 0.0, 0)

    light = replace(row([1, 9, 9, 9], 3), loss_weights=np.array([0, 0.5, 0.5, 0.5], np.float32))
    two = [light, row([5, 9], 1)]
    assert (
        evaluate(Fixed(), micro_batches(two, 1))
        == evaluate(Fixed(), micro_batches(two, 100))
        == (1.5 * 1 + 1 * 5) / 2.5
    )


@pytest.mark.parametrize("stop_after", [0, 6])
def test_a_step_whose_weights_sum_to_0_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    skipped = {3, 6}
    of_no_weight = {i for step in skipped for i in step_rows(len(TRAIN), 2, 3, step)}
    train = [replace(r, loss_weights=r.loss_weights * (i not in of_no_weight)) for i, r in enumerate(TRAIN)]
    monkeypatch.setattr("tests.unit.test_loop.TRAIN", train)
    chosen, watch = recipe(batch_size=2, steps=7), Watch(stop_after)
    if stop_after:
        with pytest.raises(Interrupted):
            run(tmp_path, watch=watch, the_recipe=chosen)
        state, backend = run(tmp_path, the_recipe=chosen, resume=True)
    else:
        state, backend = run(tmp_path, watch=watch, the_recipe=chosen)
        assert [text for text in watch.warnings if "skipped" in text] == [
            "step 3 is skipped: its loss weights sum to 0, as those of later steps may"
        ]
        assert all(weight_sum(batches) > 0 for batches in backend.calls)
    steps = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 5, 7]
    assert [line["learning_rate"] for line in steps] == [learning_rate(chosen, n) for n in (1, 2, 4, 5, 7)]
    assert (state.step, state.label_tokens) == (7, sum(line["label_tokens"] for line in steps))


def test_what_is_counted(tmp_path: Path) -> None:
    state, backend = run(tmp_path, valid=[])
    steps = metrics(tmp_path)
    batches = [batch for call in backend.calls for batch in call]
    assert (state.step, state.train_loss) == (8, steps[-1]["loss"])
    assert state.tokens == sum(line["tokens"] for line in steps)
    assert state.label_tokens == sum(line["label_tokens"] for line in steps)
    assert state.padded_tokens == sum(batch.input_ids.size for batch in batches)
    assert state.timed_tokens == sum(line["tokens"] for line in steps[1:])
    assert state.timed_label_tokens == sum(line["label_tokens"] for line in steps[1:])
    assert state.train_seconds == pytest.approx(sum(line["seconds"] for line in steps))
    assert state.timed_seconds == pytest.approx(sum(line["seconds"] for line in steps[1:]))


# --- evaluation and the best adapter


def test_evaluation_comes_at_its_interval_and_at_the_end(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, watch=watch, the_recipe=recipe(eval_every=3))
    assert [line["step"] for line in watch.evaluations] == [0, 3, 6, 8]
    assert [list(line) for line in watch.evaluations] == [["step", "valid_loss"]] * 4
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


def test_without_validation_rows_nothing_is_evaluated(tmp_path: Path) -> None:
    watch = Watch()
    state, _ = run(tmp_path, watch=watch, valid=[])
    assert (watch.evaluations, state.best, state.best_step) == ([], None, None)


class Scripted(Bigram):
    """Its validation losses are given."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.losses = list(losses)
        self.seen: list[Adapter] = []

    def eval_step(self, batch: Batch) -> StepResult:
        self.seen.append(self.get_adapter())
        return StepResult.of([batch], self.losses.pop(0) * batch.label_tokens, 0.0, 0)


def test_the_adapter_of_the_best_validation_loss_is_kept(tmp_path: Path) -> None:
    backend = Scripted(9.0, 3.0, 1.0, 2.0, 1.0)
    state, _ = run(tmp_path, backend, the_recipe=recipe(eval_every=2), valid=VALID[:1])
    assert (state.best_valid_loss, state.best_step) == (1.0, 4)
    assert state.best is not None
    assert same(state.best, backend.seen[2])
    assert not same(state.best, backend.get_adapter())


def test_a_validation_loss_that_is_not_finite_is_told_and_never_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 2"):
        run(tmp_path, Scripted(2.0, math.nan, 1.0, 1.0, 1.0), the_recipe=recipe(eval_every=2), valid=VALID[:1])


def test_a_validation_loss_that_is_not_finite_before_the_first_step(tmp_path: Path) -> None:
    words = r"The validation loss is not finite before the first step, on the rows train.jsonl:1\.\nLook at those rows"
    with pytest.raises(UserError, match=words):
        run(tmp_path, Scripted(math.nan), valid=VALID[:1])


# --- before the first step, and before the last


def test_what_training_is_to_improve_on_is_validated_once(tmp_path: Path) -> None:
    backend = Scripted(9.0, 3.0, 4.0, 5.0)
    chosen, watch = recipe(eval_every=2, steps=6), Watch(stop_after=4)
    with pytest.raises(Interrupted):
        run(tmp_path, backend, watch, chosen, valid=VALID[:1])
    state, _ = run(tmp_path, backend, the_recipe=chosen, valid=VALID[:1], resume=True)
    assert (state.start_valid_loss, state.best_valid_loss, worse_than_start(state)) == (9.0, 3.0, False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line] == [
        *((0, 9.0), (2, 3.0), (4, 4.0), (6, 5.0))
    ]


def test_a_start_that_was_killed_leaves_no_second_line_of_its_validation(tmp_path: Path) -> None:
    class Killed(Bigram):
        def train_step(self, *args: Any) -> StepResult:
            raise KeyboardInterrupt

    for backend in (Killed(), Killed()):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, backend, resume=True)
        assert (tmp_path / "metrics.jsonl").read_text().count("valid_loss") == 1


def test_a_run_that_only_harmed_is_known(tmp_path: Path) -> None:
    state, _ = run(tmp_path, Scripted(1.0, 3.0, 2.0, 4.0), the_recipe=recipe(eval_every=3), valid=VALID[:1])
    assert (state.best_valid_loss, worse_than_start(state)) == (2.0, True)


def test_training_stops_when_validations_get_no_better(tmp_path: Path) -> None:
    chosen = recipe(eval_every=2, steps=20, patience=2, min_delta=0.01)
    watch, backend = Watch(), Scripted(9.0, 3.0, 2.0, 1.99, 2.5)  # 1.99 is not lower by a hundredth
    state, _ = run(tmp_path, backend, watch, chosen, valid=VALID[:1])
    assert (state.step, state.best_step, state.best_valid_loss) == (8, 4, 2.0)
    assert watch.said == [
        "stopped at step 8 of 20: the validation loss was 2.0000 at step 4, and not lower in the 2 validations since "
        "(--patience)"
    ]
    assert checkpoint.latest_step(tmp_path) == 8
    again, _ = run(tmp_path, Scripted(), the_recipe=chosen, valid=VALID[:1], resume=True)
    assert again.step == 8  # it is over


def test_a_run_that_stopped_early_goes_on_when_it_is_made_longer(tmp_path: Path) -> None:
    chosen = recipe(eval_every=2, steps=20, patience=2)
    run(tmp_path, Scripted(9.0, 3.0, 4.0, 5.0), the_recipe=chosen, valid=VALID[:1])
    longer = chosen.model_copy(update={"steps": 24, "parent": Parent(recipe=chosen.hash(), step=6)})
    state, _ = run(tmp_path, Scripted(3.5, 3.4), the_recipe=longer, valid=VALID[:1], resume=True)
    assert (state.step, state.best_step) == (10, 2)


def test_without_patience_every_step_is_done(tmp_path: Path) -> None:
    losses = [9.0, 1.0, *(2.0 for _ in range(19))]
    state, _ = run(tmp_path, Scripted(*losses), the_recipe=recipe(eval_every=1, steps=20), valid=VALID[:1])
    assert state.step == 20


# --- out of memory


def test_out_of_memory_cuts_finer_and_changes_nothing_else(tmp_path: Path) -> None:
    run(tmp_path / "a", the_plan=plan(micro_batch_tokens=1000))
    watch, backend = Watch(), Bigram(memory_limit=15)
    state, _ = run(tmp_path / "b", backend, watch, the_plan=plan(micro_batch_tokens=1000))
    left_out = ("seconds", "valid_loss")
    assert metrics(tmp_path / "a", *left_out) == metrics(tmp_path / "b", *left_out)
    assert state.micro_batch_tokens <= 15
    assert watch.warnings
    first = "the validation before the first step ran out of memory; micro-batches now have at most "
    assert watch.warnings[0].startswith(first)


def test_after_out_of_memory_the_finer_cut_stays(tmp_path: Path) -> None:
    class Once(Bigram):
        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            if not self.calls:
                self.calls.append(list(micro_batches))
                raise OutOfMemory
            return super().train_step(micro_batches, learning_rate, step)

    backend, watch = Once(), Watch()
    state, _ = run(tmp_path, backend, watch, the_plan=plan(micro_batch_tokens=1000), valid=[])
    widest = max(batch.input_ids.size for batch in backend.calls[0])
    assert state.micro_batch_tokens == widest // 2
    assert watch.warnings == [f"step 1 ran out of memory; micro-batches now have at most {widest // 2} tokens"]
    assert all(b.input_ids.size <= widest // 2 or len(b.lengths) == 1 for call in backend.calls[1:] for b in call)


class Told(Bigram):
    """Notes after how many calls it is told what to expect. fails: the first step runs out of memory."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.told = fails, list[tuple[int, Counter[MicroBatchShape]]]()

    def expect(self, shapes: Callable[[], Counter[MicroBatchShape]]) -> None:
        self.told.append((len(self.calls), shapes()))

    def train_step(self, micro_batches: Sequence[Batch], learning_rate: float, step: int) -> StepResult:
        if self.fails:
            self.fails = False
            self.calls.append(list(micro_batches))
            raise OutOfMemory
        return super().train_step(micro_batches, learning_rate, step)


def test_a_backend_is_told_what_to_expect_before_the_first_validation(tmp_path: Path) -> None:
    backend, the_plan = Told(), plan(device="gpu")
    run(tmp_path, backend, the_plan=the_plan)
    expected = Work.of(TRAIN, recipe(), VALID).expected(8, the_plan, the_plan.micro_batch_tokens)
    assert backend.told == [(0, expected)]
    longest = max(len(row.ids) - 1 for row in VALID)
    assert any(shape[:3] == (1, longest, longest) for shape in expected)


def test_a_step_is_repeated_after_smaller_micro_batches_are_expected(tmp_path: Path) -> None:
    backend = Told(fails=True)
    run(tmp_path, backend, the_plan=plan(micro_batch_tokens=1000), valid=[])
    (first, large), (second, small) = backend.told
    assert (first, second) == (0, 1)
    assert max(shape.positions for shape in small) < max(shape.positions for shape in large)
    assert {batch.shape for batches in backend.calls[1:] for batch in batches} == {*small}


def test_where_no_cut_is_left_gradients_are_checkpointed_and_the_step_done_again(tmp_path: Path) -> None:
    class Lean(Bigram):
        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            if not self.plan.gradient_checkpointing:
                raise OutOfMemory
            return super().train_step(micro_batches, learning_rate, step)

    run(tmp_path / "a", the_plan=plan(micro_batch_tokens=1))
    watch, backend = Watch(), Lean()
    state, _ = run(tmp_path / "b", backend, watch, the_plan=plan(micro_batch_tokens=1))
    left_out = ("seconds", "valid_loss")
    assert metrics(tmp_path / "a", *left_out) == metrics(tmp_path / "b", *left_out)
    assert state.gradient_checkpointing
    assert len(watch.warnings) == 1
    assert watch.warnings[0].endswith("(gradient checkpointing)")
    _, other = run(tmp_path / "b", Lean(), the_plan=plan(micro_batch_tokens=1), resume=True)
    assert other.plan.gradient_checkpointing, "it does not stay switched on"


# --- a device whose errors come late


class Late(Bigram):
    """A device that leaves a step's results unwritten, as zeros, and says so at its next use, or not at all.

    fails: the steps that fail, once each. at: who hears of it: the next step, whoever reads the loss, or nobody.
    """

    def __init__(self, at: str, *fails: int) -> None:
        super().__init__()
        self.at, self.fails = at, list(fails)
        self.before: tuple[dict, object] | None = None  # what was before the step that failed
        self.done: list[int] = []

    def undo(self) -> None:
        assert self.before is not None
        self.parameters, self.optimizer = self.before[0], self.before[1]  # type: ignore[assignment]
        self.before = None

    def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
        if self.before is not None and self.at == "the next step":
            self.undo()
            raise OutOfMemory("late", undid_previous=True)
        before = ({name: array.copy() for name, array in self.parameters.items()}, self.optimizer)
        result = super().train_step(micro_batches, learning_rate, step)
        self.done.append(step)
        if step not in self.fails:
            return result
        self.fails.remove(step)
        self.before = before
        self.parameters = {name: np.zeros_like(array) for name, array in self.parameters.items()}
        loss = Unwritten(self) if self.at == "the reader" else 0.0
        return replace(result, loss_sum=loss, grad_norm=0.0)


class Unwritten:
    def __init__(self, backend: Late) -> None:
        self.backend = backend

    def __float__(self) -> float:
        self.backend.undo()
        raise OutOfMemory("late")


@pytest.mark.parametrize(
    ("at", "step"), [("the next step", 2), ("the next step", 6), ("the reader", 1), ("the reader", 4)]
)
def test_a_step_that_was_never_written_is_done_again_before_anything_else(tmp_path: Path, at: str, step: int) -> None:
    """Nobody hears of steps 1, 4 and 8 but their reader: the first warms up, the others are validated and saved."""
    sound, _ = run(tmp_path / "sound")
    watch, backend = Watch(), Late(at, step)
    state, _ = run(tmp_path / "late", backend, watch)
    assert backend.done == [*range(1, step + 1), *range(step, 9)]
    left_out = ("seconds", "valid_loss")  # cut otherwise: it rounds otherwise
    assert metrics(tmp_path / "late", *left_out) == metrics(tmp_path / "sound", *left_out)
    assert (state.best_step, state.best_valid_loss) == (sound.best_step, pytest.approx(sound.best_valid_loss))
    assert [text.partition(";")[0] for text in watch.warnings] == [f"step {step} ran out of memory"]


def test_a_step_that_fails_twice_is_undone_twice(tmp_path: Path) -> None:
    run(tmp_path / "sound")
    backend = Late("the next step", 2, 2, 3)
    run(tmp_path / "late", backend)
    assert backend.done == [1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8]
    left_out = ("seconds", "valid_loss")
    assert metrics(tmp_path / "late", *left_out) == metrics(tmp_path / "sound", *left_out)


def test_what_a_failed_step_had_computed_is_let_go_before_the_one_before_it_is_repeated(tmp_path: Path) -> None:
    class Holding(Late):
        computed: weakref.ref[np.ndarray] | None = None

        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            assert self.computed is None or self.computed() is None
            computed = np.zeros(9)
            self.computed = weakref.ref(computed)
            return super().train_step(micro_batches, learning_rate, step)

    backend = Holding("the next step", 2)
    run(tmp_path, backend)
    assert backend.done == [1, 2, 2, 3, 4, 5, 6, 7, 8]


def test_where_a_step_undone_cannot_be_smaller_it_is_not_reported(tmp_path: Path) -> None:
    backend = Late("the next step", *[2] * 9)
    with pytest.raises(UserError, match="Step 2 ran out of memory with one row at a time"):
        run(tmp_path, backend, the_plan=plan(micro_batch_tokens=1))
    assert [line["step"] for line in metrics(tmp_path)] == [1]


@pytest.mark.parametrize("step", [2, 4])
def test_zeros_of_which_nobody_hears_are_not_believed(tmp_path: Path, step: int) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, Late("nobody", step), the_recipe=recipe(learning_rate=1e-6))
    assert caught.value.what.startswith(f"The loss or its gradient is exactly 0 at step {step}, on the rows train.")
    assert checkpoint.latest(tmp_path) is None


def test_an_error_of_the_next_step_is_not_taken_for_one_of_a_true_zero(tmp_path: Path) -> None:
    class Learned(Late):
        """Step 2 has nothing to learn. Step 3 is not written, which the next to use the device hears."""

        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            result = super().train_step(micro_batches, learning_rate, step)
            return replace(result, loss_sum=0.0, grad_norm=0.0) if step == 2 else result

        def eval_step(self, batch: Batch) -> StepResult:
            if self.before is not None:
                self.undo()
                raise OutOfMemory("late")
            return replace(super().eval_step(batch), loss_sum=0.0)

    watch, backend = Watch(), Learned("the reader", 3)
    run(tmp_path, backend, watch)
    assert backend.done == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert [text.partition(";")[0] for text in watch.warnings] == ["step 3 ran out of memory"]


@pytest.mark.parametrize("part", ["loss_sum", "grad_norm"])
def test_one_zero_is_enough(tmp_path: Path, part: str) -> None:
    class Zero(Bigram):
        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            return replace(super().train_step(micro_batches, learning_rate, step), **{part: 0.0})

    with pytest.raises(UserError, match="exactly 0 at step 1"):
        run(tmp_path, Zero())


def test_a_zero_is_believed_where_nothing_is_left_to_learn(tmp_path: Path) -> None:
    class Learned(Bigram):
        """It knows every row by heart."""

        def train_step(self, micro_batches: list[Batch], learning_rate: float, step: int) -> StepResult:
            return replace(super().train_step(micro_batches, learning_rate, step), loss_sum=0.0, grad_norm=0.0)

        def eval_step(self, batch: Batch) -> StepResult:
            return replace(super().eval_step(batch), loss_sum=0.0)

    state, _ = run(tmp_path, Learned())
    assert (state.step, state.best_valid_loss, state.best_step) == (8, 0.0, 4)


def test_a_validation_of_zero_is_not_taken_for_the_best(tmp_path: Path) -> None:
    class Once(Bigram):
        """The micro-batches of the second validation were never written."""

        def eval_step(self, batch: Batch) -> StepResult:
            found = super().eval_step(batch)
            unwritten = self.optimizer.step == 8 and len(batch.lengths) > 1
            return replace(found, loss_sum=0.0) if unwritten else found

    with pytest.raises(UserError, match=r"validation loss is exactly 0 at step 8.*The checkpoint of step 8 is kept"):
        run(tmp_path, Once(), the_plan=plan(micro_batch_tokens=1000), valid=rows(2, seed=2))


# --- a disk that is full


class Disk:
    """Refuses to make durable what `refuses` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Path], bool]) -> None:
        self.sync, self.refuses = files._sync, refuses
        monkeypatch.setattr(files, "_sync", self)

    def __call__(self, path: Path) -> None:
        if self.refuses(path):
            full_disk(path)
        self.sync(path)


def test_a_checkpoint_that_the_disk_refuses_is_tried_again_when_the_next_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_plan, watch = plan(save_every=2), Watch()
    run(tmp_path / "sound", the_plan=the_plan)
    Disk(monkeypatch, lambda path: "step-000002" in str(path) or "step-000004" in str(path))
    state, _ = run(tmp_path / "full", watch=watch, the_plan=the_plan)
    assert [text.partition(":")[0] for text in watch.warnings] == [
        "no checkpoint of step 2",
        "no checkpoint of step 4",
    ]
    assert (
        f"No space left on device: {tmp_path}/full/checkpoints/step-000002/adapter; it is tried again"
        in watch.warnings[0]
    )
    assert sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    assert metrics(tmp_path / "full", "seconds") == metrics(tmp_path / "sound", "seconds")
    assert state.best_step is not None


def test_the_last_checkpoint_is_tried_again_after_the_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [True]
    Disk(monkeypatch, lambda path: "step-000008" in str(path) and bool(refusals and refusals.pop()))
    run(tmp_path)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found[0].step, found[0].evaluated) == (8, 8)


def test_the_last_try_promises_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    Disk(monkeypatch, lambda path: "step-000008" in str(path))
    run(tmp_path, watch=watch)
    assert [text.partition("; ")[2] for text in watch.warnings] == [
        "it is tried again later",
        "so the run cannot be lengthened from this step",
    ]


def test_a_stop_on_a_full_disk_says_which_file_and_from_where_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, lambda path: "step-000006" in str(path))
    with pytest.raises(UserError) as caught:
        run(tmp_path, watch=Watch(stop_after=6))
    assert caught.value.what == f"No space left on device: {tmp_path}/checkpoints/step-000006/adapter"
    assert caught.value.fix.startswith("Free space on that disk, then continue from step 4: ")
    assert caught.value.fix.endswith(f"train --resume {tmp_path}")


def test_a_validation_that_the_disk_refuses_is_repeated_at_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "sound")
    disk, watch = Disk(monkeypatch, lambda path: path.name.endswith("evaluation.json")), Watch()
    run(tmp_path / "full", watch=watch)
    assert [text.partition("; ")[2] for text in watch.warnings] == ["a resumed run repeats this validation"] * 2
    disk.refuses = lambda path: False
    run(tmp_path / "full", watch=(again := Watch()), resume=True)
    assert [line["step"] for line in again.evaluations] == [8]
    assert metrics(tmp_path / "full", "seconds") == metrics(tmp_path / "sound", "seconds")


class Choked:
    """metrics.jsonl on a disk that takes `takes` bytes of each line of the steps `refuses`, and then refuses."""

    def __init__(self, file: Any, refuses: set[int], takes: int = 0) -> None:
        self.file, self.refuses, self.takes, self.closed = file, refuses, takes, False

    def write(self, content: bytes) -> int:
        step = max(int(number) for number in re.findall(rb'"step": (\d+)', content) or [0])
        if step not in self.refuses:
            return int(self.file.write(content))
        if not self.takes:
            full_disk(Path())
        self.file.write(content[: self.takes])
        taken, self.takes = self.takes, 0
        return taken

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("takes", [0, 3])
def test_lines_that_the_disk_refuses_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: int
) -> None:
    run(tmp_path / "sound")
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *a, **k: (
            Choked(opened(path, mode, *a, **k), {2, 3}, takes) if mode == "ab" else opened(path, mode, *a, **k)
        ),
    )
    watch = Watch()
    run(tmp_path / "full", watch=watch)
    path = tmp_path / "full" / "metrics.jsonl"
    said = "No space left on device; training continues, and its lines are written later"
    assert watch.warnings == [f"{path}: {said}"]
    assert metrics(tmp_path / "full", "seconds") == metrics(tmp_path / "sound", "seconds")


def test_lines_that_never_find_room_cost_nothing_but_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", *a, **k: (
            Choked(opened(path, mode, *a, **k), {7, 8}) if mode == "ab" else opened(path, mode, *a, **k)
        ),
    )
    watch = Watch()
    state, _ = run(tmp_path, watch=watch)
    assert state.step == 8
    assert watch.warnings[-1] == f"{tmp_path / 'metrics.jsonl'} lacks its last 3 lines: the disk refuses them"


@pytest.mark.parametrize("full", [False, True])
def test_the_last_lines_are_written_whole_or_counted(tmp_path: Path, full: bool) -> None:
    """At the end the disk takes four bytes, and then the rest or nothing."""
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    kept = Metrics(path, 0, False, warnings.append)
    takes, file = iter([0, 4, 0] if full else [0, 4, 99]), kept._file

    def write(content: bytes) -> int:
        if not (size := next(takes)):
            full_disk(path)
        return file.write(content[:size])

    kept._file = SimpleNamespace(write=write, close=file.close)  # type: ignore[assignment]
    kept.write({"step": 1})
    assert len(warnings) == 1
    kept.close()
    said = f"{path} lacks its last 1 lines: the disk refuses them"
    assert (path.read_text(), warnings[1:]) == (('{"st', [said]) if full else ('{"step": 1}\n', []))


# --- swap


class Swapping(Bigram):
    """Swap grows by 300 MB at each step from the third on."""

    def memory(self) -> Memory:
        return Memory(1, 2, 3, "rss", 300_000_000 * max(0, len(self.calls) - 2))


def test_swap_that_grows_is_told_with_the_remedy(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, Swapping(), watch, valid=[])
    assert watch.warnings
    assert watch.warnings[0].startswith("swap has grown by 300 MB at step ")
    assert "--memory-limit" in watch.warnings[0]
    run(tmp_path / "quiet", Bigram(), quiet := Watch())
    assert quiet.warnings == []


def test_replan_cuts_finer_then_checkpoints_then_says_that_nothing_is_left(tmp_path: Path) -> None:
    watch, backend = Watch(), Swapping()
    run(tmp_path / "plain", valid=[])
    state, _ = run(tmp_path / "b", backend, watch, the_plan=plan(micro_batch_tokens=16, on_swap="replan"), valid=[])
    assert state.micro_batch_tokens < 16
    assert state.gradient_checkpointing
    assert "micro-batches now have at most" in watch.warnings[0]
    assert watch.warnings[-1].endswith("micro-batches cannot be smaller; close other programs")
    left_out = ("seconds", "valid_loss", "memory", "swap")
    assert metrics(tmp_path / "plain", *left_out) == metrics(tmp_path / "b", *left_out)


def test_one_row_at_a_time_is_the_end_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, Bigram(memory_limit=1), valid=[])
    assert caught.value.what.startswith("Step 1 ran out of memory with one row at a time; its longest row has ")
    assert caught.value.fix == "Lower --max-length or --rank, or train a smaller model."


def test_a_long_row_beside_short_ones_is_not_cut_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = [row([1] * 101, 1), *(row([1] * 11, 1) for _ in range(10))]
    monkeypatch.setattr("tests.unit.test_loop.TRAIN", mixed)
    with pytest.raises(UserError, match="its longest row has 100 tokens"):
        run(tmp_path, Bigram(memory_limit=50), the_recipe=recipe(batch_size=11), the_plan=plan(micro_batch_tokens=1000))


def test_out_of_memory_in_evaluation_cuts_finer_too(tmp_path: Path) -> None:
    class Small(Bigram):
        def eval_step(self, batch: Batch) -> StepResult:
            if len(batch.lengths) > 1:
                raise OutOfMemory
            return super().eval_step(batch)

    watch = Watch()
    run(tmp_path, Small(), watch, the_plan=plan(micro_batch_tokens=1000))
    assert [line["step"] for line in watch.evaluations] == [0, 4, 8]
    assert watch.warnings


# --- a loss that is not finite


def test_nan_loss_names_the_step_the_rows_and_the_kept_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, Bigram(nan_step=6))
    what = caught.value.what
    assert what.startswith("The loss or its gradient is not finite at step 6, on the rows train.jsonl:")
    assert what.endswith("The checkpoint of step 4 is kept.")
    chosen = [TRAIN[i].source for i in step_rows(len(TRAIN), 4, 3, 6)]
    assert ", ".join(chosen) in what
    assert caught.value.fix.startswith("Lower --learning-rate or raise --warmup")


def test_nan_loss_leaves_the_checkpoint_and_the_metrics_as_they_were(tmp_path: Path) -> None:
    run(tmp_path / "complete", the_recipe=recipe(steps=8))
    with pytest.raises(UserError):
        run(tmp_path / "nan", Bigram(nan_step=6))
    found = checkpoint.latest(tmp_path / "nan")
    assert found is not None
    assert found[0].step == 4
    assert [line["step"] for line in metrics(tmp_path / "nan")] == [1, 2, 3, 4, 4, 5]
    run(tmp_path / "nan", resume=True)
    assert metrics(tmp_path / "nan", "seconds") == metrics(tmp_path / "complete", "seconds")


def test_nan_loss_before_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No checkpoint had been written yet"):
        run(tmp_path, Bigram(nan_step=1))


# --- stop and resume


def test_a_stop_finishes_the_step_and_saves(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, watch=Watch(stop_after=3))
    assert str(caught.value) == str(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found[0].step, found[2].step) == (3, 3)


def test_a_stop_in_the_last_step_is_heeded_and_resuming_has_only_its_validation_left_to_do(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, watch=Watch(stop_after=8))
    lines = metrics(tmp_path)
    state, backend = run(tmp_path, resume=True)
    assert state.step == 8
    assert metrics(tmp_path)[:-1] == lines
    assert metrics(tmp_path)[-1].keys() == {"step", "valid_loss"}
    assert not [call for call in backend.calls if len(call) > 1]  # no step: those have several micro-batches
    again, backend = run(tmp_path, resume=True)
    assert (backend.calls, again.best_step) == ([], state.best_step)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, stop_after: int) -> None:
    complete_state, complete = run(tmp_path / "complete")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", watch=Watch(stop_after))
    state, resumed = run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")
    assert same(resumed.get_adapter(), complete.get_adapter())
    assert state.best is not None
    assert complete_state.best is not None
    assert same(state.best, complete_state.best)
    counted = ("step", "tokens", "label_tokens", "padded_tokens", "train_loss", "best_valid_loss", "best_step")
    assert {k: v for k, v in vars(state).items() if k in counted} == {
        k: v for k, v in vars(complete_state).items() if k in counted
    }


def test_a_killed_run_does_its_unsaved_steps_again_without_double_lines(tmp_path: Path) -> None:
    class Killed(Watch):
        def step(self, line: dict, memory: Memory) -> None:
            super().step(line, memory)
            if line["step"] == 7:
                raise KeyboardInterrupt  # as kill -9: nothing is saved

    run(tmp_path / "complete")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", watch=Killed())
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 4, 5, 6, 7]
    run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")


@pytest.mark.parametrize("torn", ['{"step": 5, "los', '{"step"', "{}", "\x00\x00\x00"])
def test_a_torn_line_of_metrics_is_dropped(tmp_path: Path, torn: str) -> None:
    run(tmp_path / "complete")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", watch=Watch(stop_after=4))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")


def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, the_plan=plan(save_every=3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again, backend = run(tmp_path, resume=True)
    assert backend.calls == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert {**asdict(again), "best": 0} == {**asdict(first), "best": 0}


def test_the_backend_is_never_shown_a_labeled_pad(tmp_path: Path) -> None:
    _, backend = run(tmp_path)
    for batch in (batch for call in backend.calls for batch in call):
        beyond = np.arange(batch.targets.shape[1]) >= batch.lengths[:, None]
        assert (batch.loss_weights[beyond] == 0).all()
    assert make_batch(TRAIN[:2]).tokens == sum(len(r.ids) - 1 for r in TRAIN[:2])


# --- a stop, a kill or a fault within a validation


ONE_ROW = plan(micro_batch_tokens=1)  # so that a validation has a micro-batch a row


@pytest.mark.parametrize("saves", [True, False])
def test_a_stop_within_a_validation_is_heard_saved_and_the_validation_done_at_resume(
    tmp_path: Path, saves: bool
) -> None:
    every = ONE_ROW.model_copy(update={"save_every": 4 if saves else 100})
    _, complete = run(tmp_path / "complete", the_plan=every)

    class Stopping(Bigram):
        evaluated = 0

        def eval_step(self, batch: Batch) -> StepResult:
            Stopping.evaluated += 1
            return super().eval_step(batch)

    class Asking(Watch):
        def stop_requested(self) -> bool:
            return Stopping.evaluated == len(VALID) + 2  # the second row of the second validation

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Stopping(), Asking(), the_plan=every)
    assert Stopping.evaluated < 2 * len(VALID)
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    found = checkpoint.latest(tmp_path / "cut")
    assert found is not None
    assert (found[0].step, found[0].evaluated) == (4, 0)
    state, resumed = run(tmp_path / "cut", the_plan=every, resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")
    assert same(resumed.get_adapter(), complete.get_adapter())
    assert state.evaluated == 8


def test_a_kill_within_a_validation_loses_no_step(tmp_path: Path) -> None:
    class Killed(Bigram):
        def eval_step(self, batch: Batch) -> StepResult:
            if self.calls:
                raise KeyboardInterrupt  # as kill -9
            return super().eval_step(batch)

    run(tmp_path / "complete")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Killed())
    found = checkpoint.latest(tmp_path / "cut")
    assert found is not None
    assert found[0].step == 4
    run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")


def test_a_kill_between_a_validations_line_and_its_checkpoint_leaves_no_double_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "complete")

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "add_evaluation", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 4]
    monkeypatch.undo()
    run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")


@pytest.mark.parametrize("kept", [1, 2])
def test_after_a_validation_that_is_not_finite_the_checkpoint_before_is_gone_on_from(tmp_path: Path, kept: int) -> None:
    class Once(Bigram):
        def eval_step(self, batch: Batch) -> StepResult:
            found = super().eval_step(batch)
            return replace(found, loss_sum=math.nan) if self.optimizer.step == 8 else found

    run(tmp_path / "complete")
    few = plan(keep_checkpoints=kept)
    with pytest.raises(UserError, match=r"validation loss is not finite at step 8.*The checkpoint of step 4 is kept"):
        run(tmp_path / "cut", Once(), the_plan=few)
    run(tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut", "seconds") == metrics(tmp_path / "complete", "seconds")


def test_checkpoints_come_by_time_too(tmp_path: Path) -> None:
    seldom = {"save_every": 100, "save_minutes": 1e-9}
    run(tmp_path / "a", the_plan=plan(**seldom))
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-000007", "step-000008"]
    run(tmp_path / "b", the_plan=plan(**(seldom | {"save_minutes": 0.0})))
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-000008"]
    assert metrics(tmp_path / "a", "seconds") == metrics(tmp_path / "b", "seconds")

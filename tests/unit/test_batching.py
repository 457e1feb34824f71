"""Row order and micro-batches: every row once, no pad labeled, the cut as good as any."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.backend import weight_sum
from common.data.batching import make_batch, micro_batches, rounded, step_rows, steps_per_epoch
from common.data.encode import Encoded
from tests.unit.bigram import row

# --- order


def test_an_epoch_covers_every_row_once_and_its_last_step_is_short() -> None:
    steps = [step_rows(10, 4, seed=0, step=step) for step in (1, 2, 3)]
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(number for step in steps for number in step) == list(range(10))
    assert steps_per_epoch(10, 4) == 3


def test_the_order_is_anothers_in_another_epoch_and_with_another_seed() -> None:
    first = [step_rows(50, 50, seed, step)[:50] for seed, step in ((0, 1), (0, 2), (1, 1))]
    assert sorted(first[1]) == list(range(50))
    assert first[0] != first[1]
    assert first[0] != first[2]


def test_the_order_of_a_step_needs_no_step_before_it() -> None:
    assert step_rows(10, 4, seed=5, step=8) == step_rows(10, 4, seed=5, step=8)
    assert step_rows(10, 4, seed=0, step=1) == [8, 2, 1, 0]  # written down: numpy's generators are stable


def test_a_batch_larger_than_the_data_takes_all_rows() -> None:
    assert sorted(step_rows(3, 8, 0, 1)) == [0, 1, 2]
    assert sorted(step_rows(3, 8, 0, 2)) == [0, 1, 2]


# --- padding and labels


def test_labels_are_shifted_and_pads_carry_none() -> None:
    batch = make_batch([row([11, 12, 13, 14], 2), row([21, 22], 1)])
    assert batch.input_ids.tolist() == [[11, 12, 13], [21, 0, 0]]
    assert batch.targets.tolist() == [[12, 13, 14], [22, 0, 0]]
    assert batch.loss_weights.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch.lengths.tolist() == [3, 1]
    assert (batch.tokens, batch.label_tokens) == (4, 3)
    assert (batch.input_ids.dtype, batch.targets.dtype, batch.loss_weights.dtype) == (np.int32, np.int32, np.float32)


def test_weights_are_kept_and_what_weighs_nothing_is_no_label() -> None:
    rows = [row([1, 2, 3, 4], 3), row([5, 6, 7], 2)]
    rows[0] = replace(rows[0], loss_weights=np.array([0, 0.25, 0, 2], np.float32))
    batch = make_batch(rows)
    assert batch.loss_weights.tolist() == [[0.25, 0, 2], [1, 1, 0]]
    assert (batch.label_tokens, weight_sum([batch, batch])) == (4, 8.5)
    assert [r.label_tokens for r in rows] == [2, 2]


def test_a_real_token_with_id_0_is_labeled_and_a_pad_is_not() -> None:
    batch = make_batch([row([5, 0, 0, 7], 3), row([5, 0], 1)])
    assert batch.targets.tolist() == [[0, 0, 7], [0, 0, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_an_end_token_that_serves_as_pad_is_still_a_label() -> None:
    end = 2  # the tiny tokenizer's eos and pad
    batch = make_batch([row([9, 8, end], 2), row([9, 7, 6, 5, end], 4)])
    assert batch.targets.tolist() == [[8, end, 0, 0], [7, 6, 5, end]]
    assert batch.loss_weights.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_the_first_token_is_never_a_label() -> None:
    batch = make_batch([row([4, 5], 2)])
    assert (batch.targets.tolist(), batch.loss_weights.tolist()) == ([[5]], [[1]])
    assert row([4, 5], 2).label_tokens == 1


# --- the cut


def of_lengths(*lengths: int) -> list[Encoded]:
    """Rows of so many input tokens; the first id tells them apart."""
    return [row([100 + number, *[1] * length], 1) for number, length in enumerate(lengths)]


def cut(rows: list[Encoded], budget: int) -> list[list[int]]:
    return [batch.lengths.tolist() for batch in micro_batches(rows, budget)]


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut `items` into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def cost(groups: list[list[int]]) -> float:
    """A padded position costs a quarter of a token, a start 64."""
    return sum((len(group) * max(group) - sum(group)) / 4 + 64 for group in groups)


@pytest.mark.parametrize("budget", [1, 30, 100, 300, 2000])
def test_no_way_to_cut_costs_less(budget: int) -> None:
    random = np.random.default_rng(budget)
    for _ in range(6):
        lengths = random.integers(1, 130, 6).tolist()
        allowed = [
            groups
            for groups in partitions(lengths)
            if all(len(group) == 1 or len(group) * max(group) <= budget for group in groups)
        ]
        assert cost(cut(of_lengths(*lengths), budget)) == min(map(cost, allowed))


def test_no_micro_batch_is_above_the_budget_but_a_single_row() -> None:
    batches = micro_batches(of_lengths(90, 10, 20, 10, 200, 30), 60)
    assert all(batch.input_ids.size <= 60 or len(batch.lengths) == 1 for batch in batches)
    assert [batch.lengths.tolist() for batch in batches] == [[10, 10], [20, 30], [90], [200]]


def test_rows_of_like_length_stand_together() -> None:
    assert cut(of_lengths(10, 500, 11, 490), 2000) == [[10, 11], [490, 500]]


def test_short_rows_are_not_cut_into_ones() -> None:
    assert cut(of_lengths(3, 5, 8, 12), 2000) == [[3, 5, 8, 12]]


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_every_row_and_every_label_is_there_whatever_the_cut(budget: int) -> None:
    random = np.random.default_rng(0)
    rows = [row([100 + i, *[1] * int(random.integers(1, 40))], int(random.integers(1, 5))) for i in range(30)]
    batches = micro_batches(rows, budget)
    firsts = sorted(int(ids[0]) for batch in batches for ids in batch.input_ids)
    assert firsts == list(range(100, 130))
    assert sum(batch.label_tokens for batch in batches) == sum(r.label_tokens for r in rows)
    assert sum(batch.tokens for batch in batches) == sum(len(r.ids) - 1 for r in rows)


def test_sizes_are_rounded_up_by_little_and_to_few() -> None:
    values = [rounded(size, 128, 16) for size in range(1, 9000)]
    assert all(0 <= value - size < max(128, size / 8) for size, value in enumerate(values, 1))
    assert len(set(values)) < 70
    assert (rounded(128, 128, 16), rounded(129, 128, 16), rounded(0, 64, 8)) == (128, 256, 0)


def test_a_gpu_is_given_fewer_and_larger_micro_batches() -> None:
    rows = of_lengths(10, 10, 10, 10, 100, 100, 100, 100)
    assert len(micro_batches(rows, 800)) == 2
    assert len(micro_batches(rows, 800, "cuda")) == 1
    assert len(micro_batches(rows, 400, "cuda")) == 2


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or default_rng(seed))
    rows = [row for step in range(1, 101) for row in step_rows(1_000_000, 8, 71, step)]
    assert made == [[71, 2, 0]]
    assert len({*rows}) == 800

"""Few layouts for the micro-batches of a run: each holds what it is for, and costs little more."""

from collections import Counter

import numpy as np
import pytest

from common.data.batching import make_batch, micro_batches, step_rows
from common.data.encode import Encoded
from common.data.layouts import _cost, choose_layouts, fitted, layout_for, smallest_layout
from common.memory_terms import MicroBatchShape as Shape
from common.training.planner import Work
from tests.unit.bigram import RECIPE


def encoded(lengths: np.ndarray) -> list[Encoded]:
    return [
        Encoded(np.zeros(length + 1, np.int32), np.arange(length + 1) > length // 2, f"a:{number}")
        for number, length in enumerate(lengths.tolist())
    ]


def chat_rows(count: int, spread: float) -> list[Encoded]:
    """Rows of lengths as chats have them, about 160 tokens."""
    lengths = np.random.default_rng(0).lognormal(5.1, spread, count)
    return encoded(np.clip(lengths, 8, 2048).astype(int))


def test_the_shapes_to_come_are_those_of_the_steps() -> None:
    rows = chat_rows(30, 0.6)
    recipe = RECIPE.model_copy(update={"steps": 20, "batch_size": 8})
    found = Work.of(rows, recipe).shapes_of(20, 1024, "gpu")
    steps = ([rows[i] for i in step_rows(30, 8, recipe.seed, step)] for step in range(1, 21))
    assert found == Counter(batch.shape for step in steps for batch in micro_batches(step, 1024, "gpu"))
    assert Work.of(rows, recipe).shapes_of(40, 1024, "gpu") == Counter({shape: 2 * n for shape, n in found.items()})


@pytest.mark.parametrize("most", [1024, 4096, 16384])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_eight_layouts_hold_nearly_all_of_a_run_at_a_little_padding(spread: float, most: int) -> None:
    recipe = RECIPE.model_copy(update={"steps": 1000, "batch_size": 8})
    shapes = Work.of(chat_rows(400, spread), recipe).shapes_of(1000, most, "gpu")
    layouts = choose_layouts(shapes)
    assert len(layouts) <= 8
    assert choose_layouts(shapes) == layouts
    cost = padded = 0.0
    for own, count in shapes.items():
        layout = layout_for(own, layouts)
        assert layout in layouts
        assert all(size <= most_of_it for size, most_of_it in zip(own, layout, strict=True))
        assert layout.tokens <= layout.rows * layout.width
        assert layout.width % 128 == 0
        cost += count * float(_cost(np.array(own, float)))
        padded += count * float(_cost(np.array(layout, float)))
    assert padded < (1.4 if spread == 0.5 else 1.9) * cost


def test_no_layout_takes_more_than_the_largest_micro_batch() -> None:
    shapes = Counter(
        {
            Shape(16, 60, 900, 400): 500,
            Shape(1, 1000, 1000, 300): 500,
            Shape(2, 900, 1500, 10): 1,
        }
    )
    for layout in choose_layouts(shapes):
        assert layout.rows * layout.width <= 2048
        assert layout.tokens <= 1536


def test_joined_layouts_have_no_more_attention_scores_than_the_largest_micro_batch() -> None:
    """The narrow ones allow 4,096 positions; in rows of 512 these would have four times the scores of any."""
    shapes = Counter({Shape(32, 120, 3000, 1000): 500, Shape(8, 250, 1000, 300): 10, Shape(2, 500, 1000, 300): 10})
    assert max(layout.width * layout.positions for layout in choose_layouts(shapes)) == 8 * 256**2


def test_a_validations_micro_batch_is_cut_to_fit_the_layouts() -> None:
    rows = encoded(np.arange(20, 140, 3))
    batch, layouts = make_batch([*rows, *encoded(np.array([300]))]), [Shape(8, 128, 1024, 512), Shape(3, 256, 512, 256)]
    parts = fitted(batch, layouts)
    assert [*np.concatenate([part.lengths for part in parts])] == [*batch.lengths]
    assert [layout_for(part.shape, layouts) in layouts for part in parts] == [True] * (len(parts) - 1) + [False]
    assert [len(part.lengths) for part in parts[:3]] == [8, 8, 8]
    assert parts[-1].shape == Shape(1, 300, 300, 150)
    for name in ("input_ids", "targets", "loss_weights"):
        assert sum(getattr(part, name).sum() for part in parts) == getattr(batch, name).sum()
    assert fitted(batch, []) == [batch]
    assert fitted(parts[0], layouts) == [parts[0]]


def test_few_micro_batches_share_a_layout_and_many_have_their_own() -> None:
    one, other = Shape(8, 100, 700, 300), Shape(8, 250, 1800, 900)
    (shared,) = choose_layouts(Counter({one: 10, other: 10}))
    assert shared == Shape(8, 256, 2048, 1024)
    assert len(choose_layouts(Counter({one: 1000, other: 1000}))) == 2


def test_a_micro_batch_that_was_not_expected_is_rounded() -> None:
    own = make_batch(encoded(np.array([150, 201]))).shape
    assert layout_for(own, [Shape(1, 128, 128, 64)]) == Shape(2, 256, 384, 192)
    assert layout_for(own, []) == Shape(2, 256, 384, 192)


def test_a_width_is_not_rounded_beyond_a_limit() -> None:
    assert smallest_layout(Shape(2, 60, 110, 30), widest=64) == Shape(2, 64, 128, 64)
    assert smallest_layout(Shape(1, 60, 60, 30), widest=60) == Shape(2, 60, 64, 64)

"""What --recipe auto chooses, and that it chooses nothing that was given."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.backend import Adapter, LoraWeight
from common.data.encode import Encoded
from common.data.encoded_rows import EncodedRows
from common.options import Options
from common.training.auto_recipe import auto_recipe
from common.training.setup import evaluation_interval

WEIGHT = LoraWeight(np.zeros((8, 4), np.float32), np.zeros((4, 8), np.float32), 160.0)
GIVEN = Adapter("", 1, 0.0, {"model.layers.0.q": WEIGHT})


def rows(count: int, labels: int = 25) -> EncodedRows:
    ids = np.arange(2 * labels, dtype=np.int32)
    return EncodedRows.of([Encoded(ids, ids >= labels, f"a:{n}") for n in range(count)])


def base(kind: str = "llama", hidden: int = 576, given: Any = None) -> Any:
    config = {"model_type": kind, "hidden_size": hidden}
    return SimpleNamespace(model=SimpleNamespace(config=config), shapes={"q": (hidden, hidden)}, given=given)


def chosen(count: int, labels: int = 25, model: Any = None, **given: Any) -> tuple[Options, str]:
    return auto_recipe(Options(**given), model or base(), rows(count, labels))


def test_few_rows_are_seen_often_in_small_steps() -> None:
    options, said = chosen(76)
    assert (options.epochs, options.batch_size, options.rank) == (8, 4, 16)
    assert said == (
        "76 rows, 1,900 label tokens: 8 epochs (152 steps), 4 rows a step, "
        "learning rate 0.0013 (llama of hidden size 576), rank 16 (--recipe auto)"
    )


@pytest.mark.parametrize(
    ("count", "epochs", "batch_size"),
    [(5, 20, 4), (20, 8, 4), (150, 4, 4), (400, 3, 8), (2_500, 3, 16), (20_000, 2, 16), (60_000, 1, 32)],
)
@pytest.mark.slow
def test_epochs_and_batch_by_rows(count: int, epochs: int, batch_size: int) -> None:
    options, _ = chosen(count, labels=1)
    assert (options.epochs, options.batch_size) == (epochs, batch_size)


@pytest.mark.parametrize(("labels", "epochs"), [(20, 8), (30, 8), (65, 4), (300, 3)])
def test_long_answers_are_seen_less_often(labels: int, epochs: int) -> None:
    assert chosen(76, labels=labels)[0].epochs == epochs


@pytest.mark.parametrize(
    ("kind", "hidden", "method", "rate"),
    [
        ("llama", 2048, "lora", 4.9e-4),
        ("gemma3_text", 640, "lora", 3e-4),  # no exponent is published: one rate for every width
        ("gemma3_text", 2560, "full", 3e-5),
        ("qwen3_5_text", 1024, "lora", 3e-4),
        ("qwen3", 1024, "dora", 5.3e-4),
        ("qwen3", 2560, "lora", 4.9e-4),
        ("llama", 576, "full", 1.3e-4),
    ],
)
def test_the_rate_by_family_hidden_size_and_method(kind: str, hidden: int, method: str, rate: float) -> None:
    options, _ = chosen(400, model=base(kind, hidden), method=method)
    assert options.learning_rate == rate


@pytest.mark.parametrize(
    ("given", "rate", "said"),
    [
        ({"alpha": 16}, 4.9e-4, "llama of hidden size 2048)"),
        ({"alpha": 64}, 2.5e-4, "alpha 64)"),
        ({"rslora": True}, 1.2e-4, "alpha 32 / sqrt(rank))"),
        ({"rslora": True, "rank": 64}, 6.1e-5, "alpha 32 / sqrt(rank))"),
        ({"lora_plus": 16}, 1.2e-4, "LoRA+ 16)"),
    ],
)
def test_larger_steps_of_lora_have_a_lower_rate(given: dict[str, Any], rate: float, said: str) -> None:
    options, why = chosen(400, model=base("llama", 2048), **given)
    assert options.learning_rate == rate
    assert said in why


@pytest.mark.parametrize(("batch_size", "rate"), [(4, 1.3e-3), (8, 1.9e-3), (1, 6.6e-4), (64, 2e-3)])
def test_the_rate_grows_with_the_root_of_given_rows_a_step(batch_size: int, rate: float) -> None:
    options, said = chosen(76, batch_size=batch_size)
    assert options.learning_rate == rate
    assert (f"{batch_size} rows a step instead of 4" in said) == (batch_size != 4)


def test_very_few_rows_are_seen_often_however_long() -> None:
    assert chosen(5, labels=1000)[0].epochs == 20


def test_a_given_adapters_scale_counts() -> None:
    assert chosen(400, model=base("llama", 2048, GIVEN))[0].learning_rate == 9.8e-5


def test_a_key_left_empty_is_not_given() -> None:
    assert chosen(76, epochs=None)[0].epochs == 8


def test_the_rank_holds_the_label_tokens() -> None:
    few, more, most = (chosen(10, labels=count, model=base(hidden=8))[0].rank for count in (40, 80, 4_000))
    assert (few, more, most) == (16, 32, 64)


def test_what_was_given_stays() -> None:
    options, said = chosen(76, epochs=1, batch_size=2, learning_rate=1e-5, rank=4)
    assert (options.epochs, options.batch_size, options.learning_rate, options.rank) == (1, 2, 1e-5, 4)
    assert said == ""
    options, said = chosen(76, batch_size=19)
    assert (options.batch_size, options.epochs) == (19, 8)
    assert ", 19 rows a step, " not in said


def test_steps_take_the_place_of_epochs() -> None:
    options, said = chosen(76, steps=10)
    assert (options.steps, options.epochs) == (10, None)
    assert "epochs" not in said


@pytest.mark.parametrize("changes", [{"method": "full"}, {"adapter": "some/adapter"}])
def test_no_rank_is_chosen_where_it_is_not_free(changes: dict[str, Any]) -> None:
    options, said = chosen(76, model=base(given=GIVEN if "adapter" in changes else None), **changes)
    assert options.rank == Options().rank
    assert "rank" not in said


@pytest.mark.parametrize(("valid", "expected"), [(5, 25), (40, 50), (1000, 100)])
def test_validations_come_four_times_an_epoch_or_take_a_tenth_of_the_time(valid: int, expected: int) -> None:
    assert evaluation_interval(rows(400), rows(valid), 4) == expected

"""`--recipe auto`: hyperparameters chosen for the model and the rows. Every number is here, with where it is from.

Thinking Machines: "LoRA Without Regret" (2025) and the sweeps of its tinker-cookbook. OpenAI: its fine-tuning guide.
`python -m benchmarks.regret` measures how far all this is from the best of a grid; it has not been run to its end yet.
"""

import math
from typing import Any

from common.data.batching import steps_per_epoch
from common.data.encoded_rows import EncodedRows
from common.models.training_base import Base
from common.options import Options

# Learning rate of LoRA: _RATE * (_WIDTH / hidden size) ** exponent of the family. Thinking Machines.
_RATE, _WIDTH = 5e-4, 2000
_EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
# A family whose exponent is not published takes the one that gives the lower rate: on 60 rows Gemma-3-270M's best
# validation loss was 0.21 at Llama's 1.2e-3, and 0.08 at 8e-4 (benchmarks/results/regret-gemma3-example-60.json).
_RATES = {"qwen3_5_text": 3e-4}  # at every size: tinker-cookbook's sweeps have their best at 2.5e-4 to 3e-4
_MOST_RATE = 2e-3  # for still smaller models. tinker-cookbook: 3e-3 diverges nearly everywhere
_FULL = 0.1  # of LoRA's rate, where every weight is trained. Thinking Machines
# Rows of a step, by how many rows there are at most. A small set needs many steps more than smooth ones.
_BATCHES = ((200, 4), (2_000, 8), (20_000, 16), (math.inf, 32))
_STEPS = 150  # that a run should have: fewer need a higher rate or more epochs. Thinking Machines
# Epochs, by how many rows there are at most. OpenAI: 3, fewer for many rows.
_EPOCHS = ((10_000, 3), (50_000, 2), (math.inf, 1))
_MOST_EPOCHS = 8  # with fewer than 12 rows 100 / rows, up to 25. OpenAI
# A label token holds about a bit, a parameter of an adapter about two. Thinking Machines
_RANKS = (16, 32, 64)
_BITS = 2


def auto_recipe(options: Options, base: Base, rows: EncodedRows) -> tuple[Options, str]:
    """The options with what was not given chosen, and a line that says what and why; empty where all was given.

    rows: of training.
    """
    size = None if base.given else sum(map(sum, base.shapes.values()))
    return chosen_values(options, base.model.config, size, rows)


def chosen_values(
    options: Options, config: dict[str, Any], size_of_rank_one: int | None, rows: EncodedRows
) -> tuple[Options, str]:
    """`auto_recipe` by the model's config. size_of_rank_one: an adapter's parameters; None: the adapter is given."""
    labels = int(rows.label_tokens.sum())
    chosen: dict[str, float] = {}
    reasons: list[str] = []

    def choose(name: str, value: float, shown: str) -> None:
        if name not in options.model_fields_set:
            chosen[name] = value
            reasons.append(shown)

    batch = options.batch_size if "batch_size" in options.model_fields_set else _up_to(_BATCHES, len(rows))
    epochs = _epochs(len(rows), int(batch))
    if options.steps is None:
        choose("epochs", epochs, f"{epochs} epochs")
    choose("batch_size", batch, f"{batch} rows a step")
    rate, why = _learning_rate(options, config)
    choose("learning_rate", rate, f"learning rate {rate:g} ({why})")
    if options.method != "full" and size_of_rank_one is not None:
        rank = _rank(labels, size_of_rank_one)
        choose("rank", rank, f"rank {rank}")
    result = options.model_copy(update=chosen)
    said = f"{len(rows):,} rows, {labels:,} label tokens: {', '.join(reasons)} (--recipe auto)" if chosen else ""
    return result, said


def _up_to(steps: tuple[tuple[float, int], ...], size: int) -> int:
    """Of the first step that reaches the size."""
    return next(value for limit, value in steps if size <= limit)


def _epochs(rows: int, batch_size: int) -> int:
    most = max(_MOST_EPOCHS, min(25, round(100 / rows)))
    return min(most, max(_up_to(_EPOCHS, rows), math.ceil(_STEPS / steps_per_epoch(rows, batch_size))))


def _learning_rate(options: Options, config: dict[str, Any]) -> tuple[float, str]:
    """`(the rate, in two digits; why)`"""
    hidden, kind = config["hidden_size"], config["model_type"]
    exponents = [_EXPONENTS[kind]] if kind in _EXPONENTS else [*_EXPONENTS.values()]
    rate = _RATES.get(kind, min(_MOST_RATE, *(_RATE * (_WIDTH / hidden) ** exponent for exponent in exponents)))
    why = f"{kind} of hidden size {hidden}"
    if options.method == "full":
        rate, why = rate * _FULL, f"{why}, every weight"
    return float(f"{rate:.1e}"), why


def _rank(labels: int, size_of_rank_one: int) -> int:
    """size_of_rank_one: the parameters of an adapter of rank 1."""
    return next((rank for rank in _RANKS if _BITS * rank * size_of_rank_one >= labels), _RANKS[-1])

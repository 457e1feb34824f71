"""`--recipe auto`: hyperparameters chosen for the model and the rows. Every number is here, with where it is from.

Thinking Machines: "LoRA Without Regret" (2025) and the sweeps of its tinker-cookbook. OpenAI: its fine-tuning guide.
Own choices are called so. `python -m benchmarks.regret` measures how far all this is from the best.
"""

import math
from typing import Any

from common.data.batching import steps_per_epoch
from common.data.encoded_rows import EncodedRows
from common.models.training_base import Base, adapter_options
from common.options import Options

# Learning rate of LoRA: _RATE * (_WIDTH / hidden size) ** exponent of the family. Thinking Machines. Its sweeps, of 128
# rows a step, have their best higher: 9e-4 to 1e-3 for Llama-3.2-1B and 3B, where this gives 4.9e-4 and 3.6e-4. With
# the fewer rows of our steps the best is lower. Where other rows a step are given, the rate grows with their root.
_RATE, _WIDTH = 5e-4, 2000
_EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
_MOST_RATE = 2e-3  # for still smaller models. tinker-cookbook: 3e-3 diverges nearly everywhere
# Of families without a published exponent: in tinker-cookbook's sweeps within 1.1 % of the best on 29 of 31 models.
_OTHER_RATE = 3e-4
_ALPHA = 32  # of the rates above; with twice that a step is twice as large. Thinking Machines
_FULL = 0.1  # of LoRA's rate, where every weight is trained. Thinking Machines
# Rows of a step, by how many rows there are at most: a small set needs many steps more than smooth ones. Own choice.
_BATCHES = ((200, 4), (2_000, 8), (20_000, 16), (math.inf, 32))
_STEPS = 150  # that a run should have: fewer need a higher rate or more epochs. Thinking Machines
# Epochs, by how many rows there are at most. OpenAI: 3, fewer for many rows.
_EPOCHS = ((10_000, 3), (50_000, 2), (math.inf, 1))
_MOST_EPOCHS = 8  # to have those steps: own choice. At least 100 / rows, of them up to 25: OpenAI
# Label tokens, seen again in each epoch, that more epochs are not to exceed. Own choice: SmolLM2-135M overfits in 8
# epochs on 4,400 label tokens of WikiSQL and on 5,000 of an identity, and learns 900 of the example to the end.
_SEEN_LABELS = 16_000
# A label token holds about a bit, a parameter of an adapter about two. Thinking Machines
_RANKS = (16, 32, 64)
_BITS = 2


def auto_recipe(options: Options, base: Base, rows: EncodedRows) -> tuple[Options, str]:
    """The options with what was not given chosen, and a line that says what and why; empty where all was given.

    rows: of training.
    """
    size = None if base.given else sum(map(sum, base.shapes.values()))
    return chosen_values(options, base.model.config, size, rows, adapter_options(base.given))


def chosen_values(
    options: Options,
    config: dict[str, Any],
    size_of_rank_one: int | None,
    rows: EncodedRows,
    given: dict[str, Any] | None = None,
) -> tuple[Options, str]:
    """`auto_recipe` by the model's config. size_of_rank_one: an adapter's parameters; None: the adapter is given.

    given: what that one determines.
    """
    labels = int(rows.label_tokens.sum())
    chosen: dict[str, float] = {}
    reasons: list[str] = []

    def choose(name: str, value: float, shown: str) -> None:
        if name not in options.model_fields_set or getattr(options, name) is None:  # a key left empty in YAML
            chosen[name] = value
            reasons.append(shown)

    usual = _up_to(_BATCHES, len(rows))
    batch = options.batch_size if "batch_size" in options.model_fields_set else usual
    epochs = _epochs(len(rows), labels, int(batch))
    if options.steps is None:
        steps = epochs * steps_per_epoch(len(rows), int(batch))
        choose("epochs", epochs, f"{epochs} epochs ({steps:,} steps)")
    choose("batch_size", batch, f"{batch} rows a step")
    chooses_rank = options.method != "full" and size_of_rank_one is not None and "rank" not in options.model_fields_set
    rank = _rank(labels, size_of_rank_one or 1) if chooses_rank else options.rank
    known = options.model_copy(update={"rank": rank, "batch_size": batch} | (given or {}))
    rate, why = _learning_rate(known, config, usual)
    choose("learning_rate", rate, f"learning rate {rate:g} ({why})")
    if chooses_rank:
        choose("rank", rank, f"rank {rank}")
    result = options.model_copy(update=chosen)
    said = f"{len(rows):,} rows, {labels:,} label tokens: {', '.join(reasons)} (--recipe auto)" if chosen else ""
    return result, said


def _up_to(steps: tuple[tuple[float, int], ...], size: int) -> int:
    """Of the first step that reaches the size."""
    return next(value for limit, value in steps if size <= limit)


def _epochs(rows: int, labels: int, batch_size: int) -> int:
    """labels: tokens of an epoch."""
    more = min(math.ceil(_STEPS / steps_per_epoch(rows, batch_size)), math.ceil(_SEEN_LABELS / max(1, labels)))
    return max(_up_to(_EPOCHS, rows), min(25, round(100 / rows)), min(_MOST_EPOCHS, more))


def _learning_rate(options: Options, config: dict[str, Any], usual: int) -> tuple[float, str]:
    """`(the rate, in two digits; why)`. usual: rows a step, where none are given."""
    hidden, kind = config["hidden_size"], config["model_type"]
    exponent = _EXPONENTS.get(kind)
    rate = _RATE * (_WIDTH / hidden) ** exponent if exponent else _OTHER_RATE
    rate = min(_MOST_RATE, rate * math.sqrt(options.batch_size / usual))
    why = f"{kind} of hidden size {hidden}"
    if options.batch_size != usual:
        why += f", {options.batch_size} rows a step instead of {usual}"
    if options.method == "full":
        rate, why = rate * _FULL, f"{why}, every weight"
    else:
        for name, times in _scaled(options).items():
            rate, why = rate / times, f"{why}, {name}"
    return float(f"{rate:.1e}"), why


def _scaled(options: Options) -> dict[str, float]:
    """What makes a step of LoRA larger than the rates are meant for, and how many times: the rate is divided by it."""
    found = {}
    if (scale := options.alpha * (options.rank**0.5 if options.rslora else 1) / _ALPHA) > 1:
        found[f"alpha {options.alpha:g}{' / sqrt(rank)' if options.rslora else ''}"] = scale
    if options.lora_plus > 1:  # B has so much more: shared out evenly between A, which has less then, and B. Own choice
        found[f"LoRA+ {options.lora_plus:g}"] = options.lora_plus**0.5
    return found


def _rank(labels: int, size_of_rank_one: int) -> int:
    """size_of_rank_one: the parameters of an adapter of rank 1."""
    return next((rank for rank in _RANKS if _BITS * rank * size_of_rank_one >= labels), _RANKS[-1])

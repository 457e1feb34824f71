"""What a base model already answers of the rows that it is to be trained on."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.backend import Backend, Progress
from common.context import Context
from common.data.encoded_rows import EncodedRows
from common.inference.chat_models import untrained
from common.models.load import loaded
from common.models.training_base import Base
from common.option_fields import RecipeFields
from common.options import Options
from common.recipe import Plan, Recipe

ASKED = 64  # rows at most
_SECONDS = 120.0  # after which no further row is asked
_TOKENS = 128  # of an answer that are looked at: the logits of more take much memory


@dataclass(frozen=True)
class BaseAnswers:
    """Of `asked` rows. answered: those whose answer is the base's own, token by token. loss: mean of a label token."""

    asked: int
    answered: int
    loss: float


def base_answers(
    options: Options, base: Base, rows: EncodedRows, plan: dict[str, Any], context: Context
) -> BaseAnswers:
    """Of rows drawn by --seed. plan: the backend, the device by name and the precision to compute with."""
    count = min(ASKED, len(rows))
    chosen = np.sort(np.random.default_rng([options.seed, 6]).choice(len(rows), count, replace=False))
    recipe, adapter = untrained(base.training_base, _recipe(options, base, plan["precision"]))
    where = Plan(backend=plan["backend"], device="cpu", micro_batch_tokens=1, save_every=1).on(plan["device"])
    with context.display.stage("load the model"):
        backend, _ = loaded(context, recipe, where, base.training_base, adapter)
    try:
        with context.display.stage("ask the base model") as progress:
            return _asked(backend, rows.take(chosen), progress)
    finally:
        backend.close()


def _asked(backend: Backend, rows: EncodedRows, progress: Progress) -> BaseAnswers:
    """One pass over each row: where every label is the likeliest token, greedy decoding gives the row's answer."""
    started, answered, losses = time.perf_counter(), 0, list[np.ndarray]()
    for number, row in enumerate(rows):
        if time.perf_counter() - started > _SECONDS:
            break
        progress(number / len(rows), row.source)
        positions = np.flatnonzero(row.mask[1:])[:_TOKENS]
        logits = backend.logits(row.ids[: positions[-1] + 1], False, positions)
        labels = row.ids[1:][positions]
        answered += bool((logits.argmax(axis=-1) == labels).all())
        shifted = logits - logits.max(axis=-1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(labels)), labels])
    return BaseAnswers(len(losses), answered, float(np.concatenate(losses).mean()))


def _recipe(options: Options, base: Base, precision: Any) -> Recipe:
    """A recipe by which a model is loaded and nothing is trained."""
    given = {name: getattr(options, name) for name in RecipeFields.model_fields if name != "targets"}
    unknown = dict.fromkeys(("model_hash", "data_hash", "template_hash", "data"), "")
    length = {"steps": 1, "warmup_steps": 0, "eval_every": 1}
    model = {"model": options.model, "precision": precision, "targets": [], "quantization": base.scheme}
    return Recipe.model_validate(given | unknown | length | model)

"""Recipe and plan of a training, out of the options and what is known of model and data."""

import math

from common.backend import Progress
from common.data.batching import steps_per_epoch
from common.data.encode import template_hash
from common.data.encoded_rows import EncodedRows, rows_hash
from common.data.facts import data_hash
from common.data.training_rows import EVALUATED_COST, EVALUATION_SHARE, TrainingRows
from common.models.adapter_files import adapter_hash
from common.models.shapes import target_names
from common.models.training_base import Base, adapter_options
from common.option_fields import RecipeFields
from common.options import Options
from common.recipe import VERSION, Parent, Plan, Recipe

_EVALUATIONS = 4  # an epoch, at most
ENOUGH = 10  # validation rows; the mean loss of fewer says too little to stop by


def make_recipe(
    options: Options,
    base: Base,
    rows: TrainingRows,
    precision: str,
    progress: Progress = lambda share, text: None,
    parent: Parent | None = None,
    version: int = VERSION,
) -> Recipe:
    """The recipe, every `auto` resolved. precision: bf16 or fp32. progress: of hashing the model."""
    steps, warmup_steps = length(options, len(rows.train.rows))
    as_given = {name: getattr(options, name) for name in RecipeFields.model_fields if name != "targets"}
    return Recipe(
        **as_given | adapter_options(base.given) | _of_validation(options, rows),
        model=options.model or "",
        data=" + ".join(options.data),
        model_hash=base.model.content_hash(progress, read=options.rehash),
        version=version,
        data_hash=data_hash(rows.data, version),
        template_hash=template_hash(rows.encoder.tokenizer),
        rows_hash=rows_hash(rows.train.rows, rows.scored, version=version),
        precision=precision,  # type: ignore[arg-type]  # pydantic checks it
        targets=target_names(base.shapes if base.given is None else dict.fromkeys(base.given.weights, (0, 0))),
        adapter_hash=adapter_hash(base.given) if base.given else "",
        quantization=base.scheme,
        steps=steps,
        warmup_steps=warmup_steps,
        eval_every=options.eval_every or evaluation_interval(rows.train.rows, rows.scored, options.batch_size),
        parent=parent,
    )


def _of_validation(options: Options, rows: TrainingRows) -> dict[str, int]:
    """What the number of validation rows says: of few no loss to stop by, of many those that are scored."""
    drawn = len(rows.scored) < len(rows.valid.rows)
    return {
        "patience": options.patience * (len(rows.scored) >= ENOUGH),
        "eval_rows": len(rows.scored) if drawn else options.eval_rows,
    }


def length(options: Options, rows: int) -> tuple[int, int]:
    """`(steps, warm-up steps)` of the recipe. rows: of an epoch."""
    per_epoch = steps_per_epoch(rows, options.batch_size)
    steps = options.steps or max(1, math.ceil(round((options.epochs or 3) * per_epoch, 6)))  # 0.07 * 100 is above 7
    warmup = round(options.warmup * steps) if options.warmup < 1 else min(int(options.warmup), steps)
    return steps, warmup


def evaluation_interval(train: EncodedRows, valid: EncodedRows, batch_size: int) -> int:
    """Steps between validations: a fourth of an epoch, or so many that validating takes a tenth of the time.

    A token that is only evaluated takes half the time of one that is trained on: its backward pass is left out.
    """
    per_epoch = steps_per_epoch(len(train), batch_size)
    step_tokens = batch_size * train.lengths.mean()
    within_a_tenth = math.ceil(EVALUATED_COST * valid.lengths.sum() / (EVALUATION_SHARE * step_tokens))
    return max(1, min(per_epoch, max(round(per_epoch / _EVALUATIONS), within_a_tenth)))


def make_plan(options: Options, backend: str, device: str, rows: TrainingRows) -> Plan:
    """A plan whose micro-batches are still to be chosen: of one token, so of one row."""
    return Plan(
        backend=backend,  # type: ignore[arg-type]  # pydantic checks it
        device="cpu",  # `on` replaces it
        ranks=int(options.devices or 1),
        micro_batch_tokens=1,
        on_swap=options.on_swap,
        save_every=options.save_every or steps_per_epoch(len(rows.train.rows), options.batch_size),
        save_minutes=options.save_minutes,
        keep_checkpoints=options.keep_checkpoints,
    ).on(device)

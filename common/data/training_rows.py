"""The rows of a training: read, encoded, limited to --max-length, and the warnings about them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.backend import Progress
from common.data.dataset import Counted, Dataset, Example
from common.data.encode import Encoder, exported_template, masking_of
from common.data.encode_rows import SHOWN, encode_parts
from common.data.encoded_rows import EncodedRows, stop_ids
from common.data.file_rows import FileRows
from common.data.findings import QualityWarning, beyond_context, control_tokens, quality_warnings
from common.data.load import check_fields
from common.data.mixed_rows import MixedRows
from common.data.row_cache import cache_refused
from common.data.sources import are_folders, named, read_sources
from common.data.truncation import FilteredRows, filter_by_length, lengths_shown
from common.data.turn_edges import BadRow
from common.display import Display
from common.errors import UserError
from common.options import Options
from common.paths import shown_path

_SHOWN_COLUMNS = 12
EVALUATION_SHARE = 0.1  # of the time of training, that validation takes at most
EVALUATED_COST = 0.5  # of a token that is trained on: its backward pass is left out
_FEWEST_SCORED = 40  # rows, whatever time they take: the loss of fewer says too little


@dataclass(frozen=True)
class TrainingRows:
    """A data set as ids and label masks."""

    data: Dataset
    train: FilteredRows
    valid: FilteredRows
    scored: EncodedRows  # the validation rows that --eval-rows leaves
    test: FilteredRows  # scored at the end, of no influence before
    stops: list[int]  # the ids that end trained turns
    template: str | None  # that serves the model as it is trained; None for plain text
    encoder: Encoder
    bad: Counted[BadRow]  # dropped: they cannot be labeled


def read_data(options: Options, display: Display) -> Dataset:
    """What --data names, with a warning for all that is suspicious. Raises UserError naming faulty rows."""
    data = load(options, display)
    warn_of_quality(options, data, display)
    return data


def warn_of_quality(options: Options, data: Dataset, display: Display) -> list[QualityWarning]:
    """Warn of all that is suspicious; the same as a list."""
    warnings = quality_warnings(data)
    for warning in warnings:
        display.warn(str(warning))
    if options.valid_share and not data.valid and not are_folders(options):
        display.warn("no row could be kept for validation: all rows have the same prompt")
    return warnings


def load(options: Options, display: Display) -> Dataset:
    """What --data names; says its format, and which columns are not read. Raises UserError naming faulty rows."""
    check_fields(options.field)
    with display.stage("read the data") as progress:
        data = read_sources(options, progress)
    if any(map(_is_large, (data.train, data.valid, data.test))) and (why := cache_refused()):
        display.warn(
            f"rows cannot be kept for the next start: {why}. XDG_CACHE_HOME names another folder for the cache"
        )
    display.say(f"{' + '.join(map(shown_path, options.data))} read as: {data.described()}")
    if data.mix:
        display.say(f"training rows of an epoch: {', '.join(data.mix)}")
    for file, columns in data.unread.items():
        more = f" and {len(columns) - _SHOWN_COLUMNS} more" if len(columns) > _SHOWN_COLUMNS else ""
        display.say(f"{file}: columns not read: {', '.join(columns[:_SHOWN_COLUMNS])}{more}")
    return data


def _is_large(rows: Sequence[Example]) -> bool:
    return any(map(_is_large, rows.parts)) if isinstance(rows, MixedRows) else isinstance(rows, FileRows)


def encode_data(options: Options, data: Dataset, tokenizer: Any, progress: Progress) -> TrainingRows:
    """Every row of `data` encoded. Raises UserError naming rows that cannot be labeled exactly."""
    masking = masking_of(options)
    encoder = Encoder(tokenizer, masking)
    parts, bad = encode_parts((data.train, data.valid, data.test), encoder, options.on_bad_row, progress)
    kept, valid, test = (filter_by_length(part, options.max_length, options.overflow) for part in parts)
    chats = any(not kind.text for kind, _ in parts[0].kinds())  # plain text does not tell how to prompt
    template = exported_template(tokenizer, masking) if chats else None
    scored = _drawn(valid.rows, _scored(options, kept.rows, valid.rows), options.seed)
    return TrainingRows(data, kept, valid, scored, test, stop_ids(parts[0]), template, encoder, bad)


def _scored(options: Options, train: EncodedRows, valid: EncodedRows) -> int:
    """How many validation rows are scored: --eval-rows, or fewer where one validation an epoch would take too long."""
    if "eval_rows" in options.model_fields_set or not valid:
        return options.eval_rows
    within = int(EVALUATION_SHARE / EVALUATED_COST * train.lengths.sum() / valid.lengths.mean())
    return min(options.eval_rows, max(_FEWEST_SCORED, within))


def _drawn(rows: EncodedRows, limit: int, seed: int) -> EncodedRows:
    """At most `limit` of the rows, in their order; 0: all."""
    if not 0 < limit < len(rows):
        return rows
    chosen = np.random.default_rng([seed, 3]).choice(len(rows), limit, replace=False)
    return rows.take(np.sort(chosen))


def report_rows(options: Options, rows: TrainingRows, display: Display) -> None:
    """Say what was changed and left out. Raises UserError where nothing is left to train on."""
    parts = rows.train, rows.valid, rows.test
    for note, count in note_counts([part.every for part in parts]).items():
        display.say(f"{count} rows: {note}")
    _warn_of_bad(rows, display)
    warn_of_plain_text(options, [part.every for part in parts], display)
    if warning := control_tokens([part.every for part in parts]):
        display.warn(str(warning))
    weighted = [part.every.take(part.every.are_weighted()) for part in parts]
    if any(map(len, weighted)):
        low, high = (pick(pick(part.weight_range()) for part in weighted if len(part)) for pick in (min, max))
        count = sum(map(len, weighted))
        display.say(f"{count} rows have labels whose loss weight is not 1 (weights from {low:g} to {high:g})")
    if unlabeled := [part.unlabeled for part in parts if part.unlabeled]:
        count = sum(map(len, unlabeled))
        display.warn(f"{count} rows without a label token are left out: {unlabeled[0][0].source} ...")
    refuse_nothing_left(options, rows)
    if len(rows.scored) < len(rows.valid.rows):
        share = f"{len(rows.scored)} of {len(rows.valid.rows)} rows"
        display.say(f"validation scores {share}, drawn by --seed (--eval-rows)")
    if rows.data.valid and not rows.valid.rows:
        display.warn("no validation row is left, so the last adapter is exported, not the best")
    _report_long(options, parts, display)


def refuse_nothing_left(options: Options, rows: TrainingRows) -> None:
    """Raises UserError where nothing is left to train on."""
    if not rows.train.every:
        raise UserError(
            f"--on-bad-row drop: no row of {named(options)} is left to train on.", "Look at it with check-data."
        )
    if not rows.train.rows and not rows.train.dropped:
        raise UserError(
            f"--train-on {options.train_on}: no token of {named(options)} is trained.",
            "Look at it with check-data --explain 1; train: false and weight: 0 take turns out.",
        )
    if not rows.train.rows:
        raise UserError(
            f"--max-length {options.max_length}: every row of {named(options)} is longer "
            f"(the shortest has {rows.train.every.lengths.min()} tokens).",
            "Raise --max-length.",
        )


def note_counts(parts: Sequence[EncodedRows]) -> dict[str, int]:
    """What was changed so that the template takes rows, and how many of them."""
    counts = Counter[str]()
    for part in parts:
        for kind, count in part.kinds():
            counts.update(dict.fromkeys(kind.notes, count))
    return counts


def _report_long(options: Options, parts: Sequence[FilteredRows], display: Display) -> None:
    """Say what became of the rows longer than --max-length."""
    if split := sum(len(part.split) for part in parts):
        display.say(f"{split} long texts are cut into blocks of {options.max_length} tokens (--overflow split)")
    for what in ("dropped", "truncated"):
        if long := [getattr(part, what) for part in parts if getattr(part, what)]:
            display.warn(
                f"{sum(map(len, long))} rows longer than --max-length {options.max_length} are {what}: "
                f"{lengths_shown(long)} (check-data lists them)"
            )


def left_out(rows: TrainingRows) -> str:
    """Where more than a tenth of all rows is left out, a line that says so; else nothing."""
    parts = rows.train, rows.valid, rows.test
    counts = {
        "longer than --max-length": sum(len(part.dropped) for part in parts),
        "without a label": sum(len(part.unlabeled) for part in parts),
        "with nothing to train": sum(map(len, rows.data.left_out.values())),
        "not readable or not labeled": len(rows.data.bad) + len(rows.bad),
    }
    out, read = sum(counts.values()), sum(len(part.every) for part in parts)
    every = read + len(rows.data.bad) + len(rows.bad) + counts["with nothing to train"]
    why = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{out} of {every} rows were left out: {why}" if out * 10 > every else ""


def _warn_of_bad(rows: TrainingRows, display: Display) -> None:
    bad = [*(f"{place}: {fault}" for place, fault in rows.data.bad.first), *(row.what for row in rows.bad.first)]
    if count := len(rows.data.bad) + len(rows.bad):
        more = [f"... and {count - SHOWN} more (check-data --on-bad-row drop lists them)"] if count > SHOWN else []
        lines = [f"{count} rows that cannot be read or labeled are dropped:", *bad[:SHOWN], *more]
        display.warn("\n".join(lines))


def warn_of_plain_text(options: Options, parts: Sequence[EncodedRows], display: Display) -> None:
    """Warn of options about turns where all rows are plain text."""
    turns = {"--train-on last": options.train_on == "last", "--thinking keep": options.thinking == "keep"}
    given, count = [option for option, chosen in turns.items() if chosen], sum(map(len, parts))
    if given and count and all(kind.text for part in parts for kind, _ in part.kinds()):
        why = f"all {count} rows are plain text, of which every token is trained"
        display.warn(f"{' and '.join(given)}: without effect on labels, as {why}")


def warn_of_context(parts: Sequence[EncodedRows], context: int, display: Display) -> None:
    """Warn of rows longer than `context`, the tokens that the model's positions were made for (0: not known)."""
    if warning := beyond_context(parts, context):
        display.warn(f"{warning}. {warning.to_do}")

"""`check-data`: what training will see of data, before it is trained on."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np

from common.commands.arguments import add_options, display_of
from common.commands.prepare import choose_hardware
from common.context import Context
from common.data.dataset import LISTED, Example
from common.data.encode import Encoded, Encoder, load_tokenizer, masking_of
from common.data.encoded_rows import EncodedRows
from common.data.findings import beyond_context, control_tokens, distinct_count, quality_warnings
from common.data.mixed_rows import distinct
from common.data.personal import hidden
from common.data.sources import named
from common.data.summary import labeled_parts
from common.data.text_sample import TextSample, text_sample
from common.data.training_rows import (
    TrainingRows,
    encode_data,
    load,
    note_counts,
    refuse_nothing_left,
    warn_of_plain_text,
)
from common.data.truncation import FilteredRows, filter_by_length
from common.data.verdict import Advice, of_base, of_rows, of_texts, of_warnings, ordered, verdict
from common.display import Display, Styled
from common.errors import UserError
from common.evaluation.base_answers import ASKED, base_answers
from common.model_files import tokenize
from common.models.families import context_length
from common.models.resolve import resolve
from common.models.training_base import find_base
from common.option_sources import load_options
from common.options import Options

_PERCENTILES = (0, 25, 50, 75, 90, 95, 100)
_SHOWN_ROWS = 3


def check_data(options: Options, explain: int | None, display: Display, asked: Context | None = None) -> None:
    """Print shapes, counts, length percentiles, suspicious and long rows, three rows with labels colored, a verdict.

    `explain`: print this training row alone, token by token. asked: to ask the base model by; None: it is not asked.
    Raises UserError for data that training would refuse.
    """
    data = load(options, display)
    model = resolve(options.model or "", display.say)
    tokenizer = load_tokenizer(model.path, options.chat_template)
    if explain is not None:
        explain_row(data.train, explain, Encoder(tokenizer, masking_of(options)), display)
        return
    shown = options.model_copy(update={"overflow": "drop" if options.overflow == "error" else options.overflow})
    with display.stage("tokenize the data") as progress:
        rows = encode_data(shown, data, tokenizer, progress)
    parts = {name: part for name in ("train", "valid", "test") if (part := getattr(rows, name)).every}
    _show_counts(options, parts, display)
    for note, count in note_counts([rows.train.every]).items():
        display.say(f"{count} training rows: {note}")
    every = [part.every for part in parts.values()]
    warnings = [*filter(None, [control_tokens(every)]), *quality_warnings(data)]
    for warning in warnings:
        display.warn(str(warning))
    warn_of_plain_text(options, every, display)
    context = beyond_context([part.rows for part in parts.values()], context_length(model.config))
    if context:
        display.warn(f"{context}. {context.to_do}")
    if dropped := [*map(list, data.bad.first), *([row.source, row.reason] for row in rows.bad.first)]:
        title = f"Rows that cannot be read or labeled: dropped{_more(len(data.bad) + len(rows.bad))}"
        display.table(title, ["row", "why"], dropped[:LISTED])
    _show_long(options, parts, display)
    for row in rows.train.rows[:_SHOWN_ROWS]:
        display.show((f"\n{row.source}: {len(row.ids)} tokens, {row.label_tokens} of them labels", "bold"))
        display.show(*colored(row, tokenizer))
    display.show(("\nlabel tokens", "black on green"), " carry loss; the others are only read")
    with display.stage("look at the texts") as progress:
        sample = text_sample(distinct(data.train), options.seed, progress)
    found = of_warnings([*warnings, *([context] if context else [])], distinct_count(data))
    known = _ask_base(options, rows, asked) if asked is not None and rows.train.rows else []
    _show_verdict(ordered([*found, *of_rows(options, rows), *of_texts(sample), *known]), sample, display)
    refuse_nothing_left(options, rows)
    if options.overflow == "error":
        for part in parts.values():
            filter_by_length(part.every, options.max_length, "error")


def _ask_base(options: Options, rows: TrainingRows, context: Context) -> list[Advice]:
    """What the base model already answers, said, and as advice."""
    hardware = choose_hardware(options, context)
    base = find_base(options, hardware.backend.value, hardware.scheme, context.display)
    plan = {name: getattr(hardware, name).value for name in ("backend", "device", "precision")}
    answers = base_answers(options, base, rows.train.rows, plan, context)
    context.display.say(
        f"base model: loss {answers.loss:.4f} a label token over {answers.asked} drawn rows, of which it answers "
        f"{answers.answered} word for word"
    )
    return of_base(answers.answered, answers.asked)


def _show_verdict(advice: Sequence[Advice], sample: TextSample, display: Display) -> None:
    """The verdict in one line, then what to do, in order; with --json all of it is one event."""
    scripts = {script: len(rows) for script, rows in sample.scripts.items()}
    if len(scripts) > 1:
        shown = sorted(scripts.items(), key=lambda item: -item[1])
        display.say(f"scripts of the answers: {', '.join(f'{script} {count}' for script, count in shown)}")
    if not sample.all:
        display.say(f"texts: {sample.rows:,} of {sample.of:,} training rows were looked at, drawn by --seed")
    lines = [f"\n{verdict(advice)}", *(["What to do:"] if advice else [])]
    lines += [f"{number}. {one}" for number, one in enumerate(advice, 1)]
    facts = {"rows_looked_at": sample.rows, "rows": sample.of, "scripts": scripts}
    display.show("\n".join(lines), kind="verdict", **facts, advice=[asdict(one) for one in advice])


def _show_counts(options: Options, parts: dict[str, FilteredRows], display: Display) -> None:
    """How many rows and tokens each part has, and how long its rows are."""
    rows, lengths = [], []
    for name, part in parts.items():
        every = part.every
        rows.append([name, str(len(every)), f"{every.lengths.sum():,}", f"{every.label_tokens.sum():,}"])
        rows[-1].append(str(len(part.dropped) + len(part.truncated)))
        lengths.append([name, *(f"{np.percentile(every.lengths, p):.0f}" for p in _PERCENTILES)])
    columns = ["", "rows", "tokens", "label tokens", f"longer than --max-length {options.max_length}"]
    display.table(f"{named(options)} by {options.model}", columns, rows)
    display.table(
        "Tokens a row, percentiles",
        ["", *("shortest" if p == 0 else "longest" if p == 100 else f"{p} %" for p in _PERCENTILES)],
        lengths,
    )


def _show_long(options: Options, parts: dict[str, FilteredRows], display: Display) -> None:
    """The rows longer than --max-length, and what becomes of them."""
    refused = "not accepted: --overflow error" if options.overflow == "error" else ""
    long: list[tuple[EncodedRows, str]] = []
    for name, how in (("dropped", "dropped"), ("truncated", "truncated"), ("split", "cut into blocks")):
        long += [(getattr(part, name), refused or how) for part in parts.values()]
    count = sum(len(rows) for rows, _ in long)
    lines = islice(([row.source, str(len(row.ids)), how] for rows, how in long for row in rows), LISTED)
    if count:
        title = f"Rows longer than {options.max_length} tokens{_more(count)}"
        display.table(title, ["row", "tokens", "in training"], [*lines])


def _more(count: int) -> str:
    """For the title of a table of so many rows."""
    return f" (the first {LISTED:,} of {count:,})" if count > LISTED else ""


def colored(row: Encoded, tokenizer: Any) -> list[tuple[str, str]]:
    """The rendered row in parts, its labeled tokens on green (in brackets where there is no color)."""
    parts = labeled_parts(row, tokenizer)
    shown = [(label, hidden(piece)) for label, piece in parts]
    return [(f"[{piece}]", "black on green") if label else (piece, "dim") for label, piece in shown]


def explain_row(examples: Sequence[Example], number: int, encoder: Encoder, display: Display) -> None:
    """Print row `number` (from 1) as a table of its tokens. Raises UserError where there is no such row."""
    if not 1 <= number <= len(examples):
        raise UserError(f"--explain {number}: there are {len(examples)} rows.", "Count from 1.")
    example = examples[number - 1]
    row = encoder(example)
    reasons = explain(example, encoder)
    pieces = encoder.tokenizer.convert_ids_to_tokens(row.ids.tolist())
    lines: list[list[Styled]] = []
    for at, (token, piece, reason) in enumerate(zip(row.ids.tolist(), pieces, reasons, strict=True)):
        text = encoder.tokenizer.decode([token])
        shown = repr(text)[1:-1] if "\ufffd" not in text else piece  # part of a letter: as the vocabulary writes it
        style = "black on green" if row.mask[at] else ""
        lines.append([str(at), str(token), (shown, style), _label(float(row.loss_weights[at])), reason])
    display.table(
        f"{row.source}: {len(row.ids)} tokens, {row.label_tokens} of them labels",
        ["", "id", "text", "", "why"],
        lines,
    )
    for note in row.notes:
        display.say(note)


def _label(weight: float) -> str:
    return "" if weight == 0 else "label" if weight == 1 else f"label, weight {weight:g}"


def explain(example: Example, encoder: Encoder) -> list[str]:
    """Why each token of the row is a label or not, in the order of `encoder(example).ids`."""
    if example.text is not None:
        row = encoder(example)
        reasons = ["plain text: every token is learned"] * len(row.ids)
        reasons[-1] = "the end of the text, appended"
        return ["BOS: nothing predicts it", *reasons[1:]] if not row.mask[0] else reasons
    row, conversation, example = encoder.encode_chat(example)
    encoding = tokenize(encoder.tokenizer, conversation.text, return_offsets_mapping=True)
    starts = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    trained = encoder.trained(example, conversation)
    reasons = [encoder.unlabeled_reason] * len(starts)
    for turn in conversation.turns:
        name = f"turn {turn.message + 1}"
        for at in np.flatnonzero((starts >= turn.start) & (starts < turn.end)):
            ends = starts[at] >= turn.stop
            if turn.message in trained:
                reasons[at] = f"{name}: its end, where the model must stop" if ends else f"{name}: the assistant's"
            elif turn.message in conversation.unreasoned:
                reasons[at] = f"{name}: not trained, as the template leaves out its reasoning"
            elif example.messages[turn.message].get("train", True):
                reasons[at] = f"{name}: not the last assistant turn (--train-on last)"
            else:
                reasons[at] = f"{name}: the row says train: false (or weight: 0)"
    if len(row.ids) > len(reasons):
        reasons = ["BOS, which the tokenizer adds and the template does not write", *reasons]
    return reasons


_DEFAULTS = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "valid_share": 0.0}
_OF_MODEL = ("backend", "device")
_OPTIONS = (
    *("model", "chat_template", "valid_share", "weights", "field", "train_on", "thinking", "tools"),
    *("max_length", "overflow", "on_bad_row", "seed", "json"),
    *_OF_MODEL,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s DATA [DATA ...] [--option VALUE ...]"
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="file, folder or hub data set, or several, as --data of train"
    )
    parser.add_argument(
        "--explain", type=int, metavar="N", help="show only training row N, counted from 1, token by token with reasons"
    )
    parser.add_argument(
        "--with-model",
        "--with_model",
        action="store_true",
        help=f"load the model, and count how many of {ASKED} rows it already answers",
    )
    add_options(parser, _OPTIONS, _DEFAULTS)


def run(args: argparse.Namespace, context: Context) -> None:
    if (idle := [f"--{name}" for name in _OF_MODEL if name in args.flags]) and not args.with_model:
        raise UserError(f"{' and '.join(idle)}: no model is loaded.", "Add --with-model, or leave it out.")
    if args.with_model and args.explain is not None:
        raise UserError("--with-model: --explain shows one row, and asks no model.", "Leave one of them out.")
    given = _DEFAULTS | args.flags | {"data": args.data}
    options, notes = load_options(given, "check-data", [*args.allowed, "data"])
    context = replace(context, display=display_of(options))
    for note in notes:
        context.display.say(note)
    check_data(options, args.explain, context.display, context if args.with_model else None)

"""`check-data --explain N`: one row, token by token: a label or not, and why."""

import numpy as np
from rich.text import Text

from common.data import Example
from common.errors import UserError
from common.progress import Display
from common.template import Encoder


def explain_row(examples: list[Example], number: int, encoder: Encoder, display: Display) -> None:
    """Print row `number` (from 1) as a table of its tokens. Raises UserError where there is no such row."""
    if not 1 <= number <= len(examples):
        raise UserError(f"--explain {number}: there are {len(examples)} rows.", "Count from 1.")
    example = examples[number - 1]
    row = encoder(example)
    reasons = explain(example, encoder)
    pieces = encoder.tokenizer.convert_ids_to_tokens(row.ids.tolist())
    lines: list[list[str | Text]] = []
    for at, (token, piece, reason) in enumerate(zip(row.ids.tolist(), pieces, reasons, strict=True)):
        said = encoder.tokenizer.decode([token])
        shown = repr(said)[1:-1] if "\ufffd" not in said else piece  # part of a letter: as the vocabulary writes it
        style = "black on green" if row.mask[at] else ""
        lines.append([str(at), str(token), Text(shown, style), "label" if row.mask[at] else "", reason])
    display.table(
        f"{row.source}: {len(row.ids)} tokens, {row.label_tokens} of them labels",
        ["", "id", "text", "", "why"],
        lines,
    )
    for note in row.notes:
        display.say(note)


def explain(example: Example, encoder: Encoder) -> list[str]:
    """Why each token of the row is a label or not, in the order of `encoder(example).ids`."""
    row = encoder(example)
    if example.text is not None:
        reasons = ["plain text: every token is learned"] * len(row.ids)
        reasons[-1] = "the end of the text, appended"
        return ["BOS: nothing predicts it", *reasons[1:]] if not row.mask[0] else reasons
    conversation, example = encoder.placed(example)
    encoding = encoder.tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    trained = encoder.trained(example, conversation)
    reasons = [encoder.unlabelled_reason] * len(starts)
    for turn in conversation.turns:
        name = f"turn {turn.message + 1}"
        for at in np.flatnonzero((starts >= turn.start) & (starts < turn.end)):
            ends = starts[at] >= turn.stop
            if turn.message in trained:
                reasons[at] = f"{name}: its end, where the model must stop" if ends else f"{name}: the assistant's"
            elif example.messages[turn.message].get("train", True):
                reasons[at] = f"{name}: not the last assistant turn (--train-on last)"
            else:
                reasons[at] = f"{name}: the row says train: false (or weight: 0)"
    if len(row.ids) > len(reasons):
        reasons = ["BOS, which the tokenizer adds and the template does not write", *reasons]
    return reasons

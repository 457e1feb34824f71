"""`check-data`: what training will see of a file, before it is trained on."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from common.data import load_data
from common.explain import explain_row
from common.models import resolve
from common.progress import Display
from common.template import Encoded, Encoder, Style, encode_all, load_tokenizer

_PERCENTILES = (0, 25, 50, 75, 90, 95, 100)
_SHOWN_ROWS = 3


def check_data(
    path: Path,
    model: str,
    max_length: int,
    display: Display,
    style: Style = Style(),  # noqa: B008  # frozen
    chat_template: str | None = None,
    explain: int | None = None,
) -> None:
    """Print counts, length percentiles, rows longer than `max_length` tokens, and three rows with labels coloured.

    Raises UserError for a file that training would refuse.
    """
    data = load_data(path, valid_share=0.0, seed=0)
    tokenizer = load_tokenizer(resolve(model, display.say), chat_template)
    if explain is not None:
        explain_row(data.train, explain, Encoder(tokenizer, style), display)
        return
    rows, lengths, long = [], [], []
    for name, examples in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if not examples:
            continue
        kept, too_long = encode_all(examples, tokenizer, max_length, style=style)
        sizes = [len(row.ids) for row in kept + too_long]
        long += too_long
        rows.append(
            [
                name,
                str(len(examples)),
                f"{sum(sizes):,}",
                f"{sum(row.label_tokens for row in kept + too_long):,}",
                str(len(too_long)),
            ]
        )
        lengths.append([name, *(f"{np.percentile(sizes, p):.0f}" for p in _PERCENTILES)])
        if name == "train":
            shown = kept[:_SHOWN_ROWS]
    display.table(
        f"{path} by {model}", ["", "rows", "tokens", "label tokens", f"longer than --max-length {max_length}"], rows
    )
    display.table(
        "Tokens a row, percentiles",
        ["", *("shortest" if p == 0 else "longest" if p == 100 else f"{p} %" for p in _PERCENTILES)],
        lengths,
    )
    if long:
        display.table(
            f"Rows longer than {max_length} tokens: training drops them",
            ["row", "tokens"],
            [[row.source, str(len(row.ids))] for row in long],
        )
    for row in shown:
        display.console.print(Text(f"\n{row.source}: {len(row.ids)} tokens, {row.label_tokens} of them labels", "bold"))
        display.console.print(coloured(row, tokenizer))
    display.console.print(Text("\nlabel tokens", "black on green") + Text(" carry loss; the others are only read", ""))


def coloured(row: Encoded, tokenizer: Any) -> Text:
    """The rendered row, its labelled tokens on green (in brackets where there is no colour)."""
    text = Text()
    edges = np.flatnonzero(np.diff(row.mask.astype(np.int8))) + 1
    for part in np.split(np.arange(len(row.ids)), edges):
        label = bool(row.mask[part[0]])
        piece = tokenizer.decode(row.ids[part].tolist())
        text.append(f"[{piece}]" if label else piece, "black on green" if label else "dim")
    return text

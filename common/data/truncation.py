"""Rows longer than --max-length: dropped, truncated or refused. A truncated row never gets an end-of-turn token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from common.backend import Progress
from common.data.dataset import Example
from common.data.encode import Encoded
from common.errors import UserError


@dataclass(frozen=True)
class FilteredRows:
    rows: list[Encoded]  # what is trained on
    dropped: list[Encoded]  # at full length
    truncated: list[Encoded]  # at full length
    unlabeled: list[Encoded]  # left out: nothing in them is trained

    def every(self) -> list[Encoded]:
        """All rows that were read, at full length."""
        cut = {row.source for row in self.truncated}
        return [*(row for row in self.rows if row.source not in cut), *self.dropped, *self.truncated, *self.unlabeled]


def encode_all(
    examples: list[Example], encode: Callable[[Example], Encoded], progress: Progress = lambda share, text: None
) -> list[Encoded]:
    rows = []
    for number, example in enumerate(examples):
        rows.append(encode(example))
        progress(number / len(examples), example.source)
    return rows


def filter_by_length(
    rows: list[Encoded], max_length: int, overflow: Literal["drop", "truncate", "error"]
) -> FilteredRows:
    """The rows of at most `max_length` tokens. Raises UserError with overflow `error`, naming the longer rows.

    A truncated row keeps its first tokens and gets no end token. A row that would keep no label is dropped.
    """
    kept: list[Encoded] = []
    dropped: list[Encoded] = []
    truncated: list[Encoded] = []
    unlabeled = [row for row in rows if not row.label_tokens]
    for row in rows:
        if not row.label_tokens:
            continue
        if len(row.ids) <= max_length:
            kept.append(row)
            continue
        cut = replace(row, ids=row.ids[:max_length], loss_weights=row.loss_weights[:max_length])
        if overflow == "truncate" and cut.label_tokens:
            kept.append(cut)
            truncated.append(row)
        else:
            dropped.append(row)
    if overflow == "error" and dropped:
        shown = ", ".join(f"{row.source} ({len(row.ids)})" for row in dropped[:5])
        more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
        raise UserError(
            f"--overflow error: {len(dropped)} rows have more than --max-length {max_length} tokens: {shown}{more}.",
            "Raise --max-length, shorten the rows, or choose --overflow drop or truncate.",
        )
    return FilteredRows(kept, dropped, truncated, unlabeled)

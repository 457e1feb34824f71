"""Rows longer than --max-length: dropped, truncated, cut into blocks, or refused.

A truncated row never gets an end-of-turn token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

import numpy as np

from common.data.encode import Encoded
from common.data.encoded_rows import EncodedRows, in_order
from common.errors import UserError


@dataclass(frozen=True)
class FilteredRows:
    every: EncodedRows  # all rows, at full length
    rows: EncodedRows  # what is trained on
    dropped: EncodedRows
    truncated: EncodedRows  # at full length
    split: EncodedRows  # plain text at full length, of which `rows` has the blocks
    unlabeled: EncodedRows  # left out: nothing in them is trained


def filter_by_length(
    given: Sequence[Encoded], max_length: int, overflow: Literal["drop", "truncate", "split", "error"]
) -> FilteredRows:
    """The rows of at most `max_length` tokens. Raises UserError with overflow `error`, naming the longer rows.

    A truncated row keeps its first tokens and gets no end token. A row that would keep no label is dropped.
    """
    rows = EncodedRows.of(given)
    unlabeled = rows.label_tokens == 0
    long = ~unlabeled & (rows.lengths > max_length)
    truncated, split = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    kept = [rows.take(~unlabeled & ~long)]
    if overflow == "split":
        split = long & rows.of_kind(lambda kind: kind.text)
        kept.append(blocks(rows.take(split), max_length))
    if overflow == "truncate":
        whole = rows.take(long)
        cut = replace(whole, last=whole.first + max_length)
        truncated[np.flatnonzero(long)[cut.label_tokens > 0]] = True
        kept.append(cut.take(cut.label_tokens > 0))
    dropped = long & ~truncated & ~split
    if overflow == "error" and dropped.any():
        raise _refused(rows.take(dropped), max_length)
    parts = (rows.take(which) for which in (dropped, truncated, split, unlabeled))
    return FilteredRows(rows, in_order(kept), *parts)


def _refused(long: EncodedRows, max_length: int) -> UserError:
    return UserError(
        f"--overflow error: {len(long)} rows have more than --max-length {max_length} tokens: {lengths_shown([long])}.",
        "Raise --max-length, shorten the rows, or choose --overflow drop, truncate or split.",
    )


def lengths_shown(parts: Sequence[EncodedRows]) -> str:
    """The first five rows, each with its length: `a.jsonl:3 (812)`."""
    count = sum(map(len, parts))
    more = f" and {count - 5} more" if count > 5 else ""
    return ", ".join(f"{row.source} ({len(row.ids)})" for row in islice(chain.from_iterable(parts), 5)) + more


def blocks(rows: EncodedRows, length: int) -> EncodedRows:
    """The rows cut into blocks of at most `length` tokens; each label of a row is a label of one of its blocks.

    Each block begins with the row's BOS, if it has one. Else it begins with the last token of the block before, from
    which its second is predicted.
    """
    bos = rows.begin_unlabeled()
    start = bos.astype(np.int64)
    counts = -(-(rows.lengths - 1) // (length - 1))
    of_row = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(of_row)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the block in its row
    found = rows.take(of_row)
    first = start[of_row] + number * (length - 1)
    last = np.minimum(first + length - bos[of_row], found.lengths)
    return replace(found, first=first, last=last, bos=bos[of_row])

"""Rows that cannot be labeled, or are longer than --max-length: dropped, truncated or refused.

A truncated row never gets an end-of-turn token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.backend import Progress
from common.data.dataset import Example
from common.data.encode import Encoded
from common.data.turn_edges import BadRow
from common.errors import UserError

SHOWN = 10  # bad rows in an error
_TOGETHER = 64  # rows that are encoded at once
EncodeRows = Callable[[Sequence[Example]], list[Encoded | BadRow]]  # Encoder.encode_batch


@dataclass(frozen=True)
class FilteredRows:
    rows: list[Encoded]  # what is trained on
    dropped: list[Encoded]  # at full length
    truncated: list[Encoded]  # at full length
    split: list[Encoded]  # plain text at full length, of which `rows` has the blocks
    unlabeled: list[Encoded]  # left out: nothing in them is trained

    @property
    def changed(self) -> list[Encoded]:
        """Rows that were cut, at full length."""
        return [*self.truncated, *self.split]

    def every(self) -> list[Encoded]:
        """All rows that were read, at full length."""
        cut = {row.source for row in self.changed}
        kept = (row for row in self.rows if row.source not in cut)
        return [*kept, *self.dropped, *self.changed, *self.unlabeled]


def encode_all(examples: Sequence[Example], encode: EncodeRows) -> list[Encoded]:
    """The rows encoded. Raises UserError naming up to ten that cannot be labeled."""
    (rows,), _ = encode_parts([examples], encode, "error")
    return rows


def encode_parts(
    parts: Sequence[Sequence[Example]],
    encode: EncodeRows,
    on_bad_row: Literal["error", "drop"],
    progress: Progress = lambda share, text: None,
) -> tuple[list[list[Encoded]], list[BadRow]]:
    """`(the rows of each part encoded, the rows that are dropped)`.

    With on_bad_row `error` no more rows are tried once ten cannot be labeled. Raises UserError naming these.
    """
    count, done, bad = sum(map(len, parts)), 0, list[BadRow]()
    encoded: list[list[Encoded]] = [[] for _ in parts]
    for examples, rows in zip(parts, encoded, strict=True):
        for start in range(0, len(examples), _TOGETHER):
            chunk = examples[start : start + _TOGETHER]
            progress(done / count, chunk[0].source)
            found = encode(chunk)
            rows += [row for row in found if isinstance(row, Encoded)]
            bad += [row for row in found if isinstance(row, BadRow)]
            done += len(chunk)
            if on_bad_row == "error" and len(bad) >= SHOWN:
                raise _refused(bad[:SHOWN])
    if bad and on_bad_row == "error":
        raise _refused(bad)
    return encoded, bad


def _refused(bad: list[BadRow]) -> UserError:
    """The error of rows that cannot be labeled."""
    fixes = " ".join(dict.fromkeys(row.fix for row in bad))
    title = f"{len(bad)} rows cannot be trained on" + (", and maybe more" if len(bad) == SHOWN else "")
    what = bad[0].what if len(bad) == 1 else "\n".join([f"{title}:", *(row.what for row in bad)])
    return UserError(what, f"{fixes} Or leave such rows out: --on-bad-row drop.")


def filter_by_length(
    rows: list[Encoded], max_length: int, overflow: Literal["drop", "truncate", "split", "error"]
) -> FilteredRows:
    """The rows of at most `max_length` tokens. Raises UserError with overflow `error`, naming the longer rows.

    A truncated row keeps its first tokens and gets no end token. A row that would keep no label is dropped.
    """
    found = FilteredRows([], [], [], [], [])
    for row in rows:
        if not row.label_tokens:
            found.unlabeled.append(row)
        elif len(row.ids) <= max_length:
            found.rows.append(row)
        elif overflow == "split" and row.text:
            found.rows.extend(blocks(row, max_length))
            found.split.append(row)
        elif overflow == "truncate" and (cut := part(row, 0, max_length)).label_tokens:
            found.rows.append(cut)
            found.truncated.append(row)
        else:
            found.dropped.append(row)
    if overflow == "error" and found.dropped:
        shown = ", ".join(f"{row.source} ({len(row.ids)})" for row in found.dropped[:5])
        more = f" and {len(found.dropped) - 5} more" if len(found.dropped) > 5 else ""
        raise UserError(
            f"--overflow error: {len(found.dropped)} rows have more than --max-length {max_length} tokens: "
            f"{shown}{more}.",
            "Raise --max-length, shorten the rows, or choose --overflow drop, truncate or split.",
        )
    return found


def part(row: Encoded, start: int, end: int) -> Encoded:
    return replace(row, ids=row.ids[start:end], loss_weights=row.loss_weights[start:end])


def blocks(row: Encoded, length: int) -> list[Encoded]:
    """The row cut into blocks of at most `length` tokens; each of its labels is a label of one of them.

    Each block begins with the row's BOS, if it has one. Else it begins with the last token of the block before, from
    which its second is predicted.
    """
    bos = not row.mask[0]
    found = []
    for start in range(1 if bos else 0, len(row.ids) - (0 if bos else 1), length - 1):
        block = part(row, start, start + length - (1 if bos else 0))
        if bos:
            ids = np.concatenate((row.ids[:1], block.ids))
            block = replace(block, ids=ids, loss_weights=np.concatenate((row.loss_weights[:1], block.loss_weights)))
        found.append(block)
    return found

"""Rows that cannot be labeled, or are longer than --max-length: dropped, truncated or refused.

A truncated row never gets an end-of-turn token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    unlabeled: list[Encoded]  # left out: nothing in them is trained

    def every(self) -> list[Encoded]:
        """All rows that were read, at full length."""
        cut = {row.source for row in self.truncated}
        return [*(row for row in self.rows if row.source not in cut), *self.dropped, *self.truncated, *self.unlabeled]


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

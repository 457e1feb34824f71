"""What is kept of the training data for the page about the run: counts, lengths, scripts, warnings, three rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.encode import Encoded
from common.data.findings import QualityWarning
from common.data.mixed_rows import distinct
from common.data.text_sample import scripts_of
from common.data.training_rows import TrainingRows
from common.data.truncation import FilteredRows
from common.options import Options
from common.run_fields import DataFacts, PartRecord, RowRecord

_BARS = 24
_ROWS = 3
_PARTS = 40  # of a row: its first and its last
_CHARACTERS = {False: 1_000, True: 2_000}  # of a part, by whether its tokens are labels
_CUT = "[…]"


def data_facts(options: Options, rows: TrainingRows, warnings: Sequence[QualityWarning], tokenizer: Any) -> DataFacts:
    """Without the text of any row where --no-text says so."""
    parts = {name: part for name in ("train", "valid", "test") if len((part := getattr(rows, name)).every)}
    edges, counts = _histogram(rows.train.rows.lengths)
    return DataFacts(
        parts={name: _part(part) for name, part in parts.items()},
        edges=edges,
        counts=counts,
        scripts=scripts_of(distinct(rows.data.train), options.seed),
        warnings=[f"{warning.count} {warning.what}. {warning.to_do}" for warning in warnings],
        rows=[] if options.no_text else [row_record(row, tokenizer) for row in rows.train.rows[:_ROWS]],
    )


def labeled_parts(row: Encoded, tokenizer: Any) -> list[tuple[bool, str]]:
    """The rendered row in parts: `(whether the part's tokens are labels, its text)`."""
    edges = np.flatnonzero(np.diff(row.mask.astype(np.int8))) + 1
    parts = np.split(np.arange(len(row.ids)), edges)
    return [(bool(row.mask[part[0]]), tokenizer.decode(row.ids[part].tolist())) for part in parts]


def _part(part: FilteredRows) -> PartRecord:
    lengths = part.rows.lengths
    return PartRecord(
        rows=len(part.rows),
        tokens=int(lengths.sum()),
        label_tokens=int(part.rows.label_tokens.sum()),
        left_out=len(part.dropped) + len(part.unlabeled),
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max()) if len(lengths) else 0,
    )


def _histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """`(edges in tokens, rows between two edges)`; whole numbers, so that no bar is narrower than a token."""
    if not len(lengths):
        return [], []
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    edges = np.arange(low, high + width + 1, width)
    return edges.tolist(), np.histogram(lengths, edges)[0].tolist()


def row_record(row: Encoded, tokenizer: Any) -> RowRecord:
    """The row as it is trained, long parts and the middle of many parts cut."""
    parts = [(label, _shortened(text, _CHARACTERS[label])) for label, text in labeled_parts(row, tokenizer)]
    if len(parts) > _PARTS:
        parts = [*parts[: _PARTS // 2], (False, f"\n{_CUT}\n"), *parts[-_PARTS // 2 :]]
    return RowRecord(source=row.source, tokens=len(row.ids), label_tokens=row.label_tokens, parts=parts)


def _shortened(text: str, most: int) -> str:
    """Its beginning and its end, where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]} {_CUT} {text[-most // 2 :]}"

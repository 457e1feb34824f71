"""What is suspicious about the rows of a data set: secrets, placeholders, duplicates, leakage, broken answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from common.data.dataset import LISTED, Dataset
from common.data.encoded_rows import EncodedRows
from common.data.facts import BREAKS_OFF, PLACEHOLDER, SECRET, TEXT, Facts, facts_of, sources_of
from common.data.mixed_rows import distinct

LEFT_IN = "rows with a placeholder left in"
REPEATS = "training rows that repeat another"
SEVERAL_ANSWERS = "training rows with the same prompt and different answers"
BROKEN_OFF = "rows whose answer seems to break off"


@dataclass(frozen=True)
class QualityWarning:
    what: str
    count: int  # of the rows
    sources: list[str]  # of the first of them
    to_do: str

    def __str__(self) -> str:
        more = f" and {self.count - 5} more" if self.count > 5 else ""
        return f"{self.count} {self.what}: {', '.join(self.sources[:5])}{more}"


def quality_warnings(data: Dataset) -> list[QualityWarning]:
    """Everything suspicious, the most serious first. Nothing is changed here."""
    every_part = [distinct(rows) for rows in (data.train, data.valid, data.test)]
    parts = [_Part(facts_of(rows), [sources_of(rows)]) for rows in every_part]
    train, held_out, every = parts[0], _Part.joined(parts[1:]), _Part.joined(parts)
    shared = np.isin(held_out.facts.contents, train.facts.contents)
    asked = np.isin(held_out.facts.prompts, train.facts.prompts[~train.facts.are(TEXT)])
    one = np.isin(held_out.facts.contents, train.facts.beginnings)
    one |= np.isin(held_out.facts.beginnings, train.facts.contents).any(axis=1)
    found = [
        every.warning(
            "rows with an API key, a token or a private key in their text",
            every.facts.are(SECRET),
            "Revoke it and remove it: the model may repeat it to anybody.",
        ),
        held_out.warning(
            "validation or test rows that are in training too",
            shared,
            "Remove them from one side: their loss says nothing about new rows.",
        ),
        held_out.warning(
            "validation or test rows whose prompt is in training, with another answer",
            asked & ~shared,
            "Keep the rows of one prompt on one side.",
        ),
        held_out.warning(
            "validation or test rows that are the beginning or the continuation of a training row",
            one & ~shared & ~asked,
            "Keep the rows of one conversation on one side.",
        ),
        *(
            QualityWarning(f"{kind}, left out", len(rows), rows.first, "Give them an answer that is trained.")
            for kind, rows in data.left_out.items()
        ),
        train.warning(
            REPEATS,
            _repeated(train.facts),
            "Remove the repeats; to count a row more, give it a weight.",
        ),
        train.warning(
            SEVERAL_ANSWERS,
            _contradicting(train.facts),
            "Keep them where several answers are right; else keep the right one.",
        ),
        every.warning(LEFT_IN, every.facts.are(PLACEHOLDER), "Fill in the placeholders, or leave these rows out."),
        every.warning(
            BROKEN_OFF,
            every.facts.are(BREAKS_OFF),
            "Complete the answers: the model learns to end where they do.",
        ),
    ]
    return [warning for warning in found if warning.count]


def distinct_count(data: Dataset) -> int:
    """How many rows there are, those that are drawn twice counted once."""
    return sum(len(distinct(rows)) for rows in (data.train, data.valid, data.test))


def control_tokens(parts: Sequence[EncodedRows]) -> QualityWarning | None:
    """The rows with control tokens of the model in their turns' text, which it reads as such; None without any."""
    tokens = {token: None for part in parts for kind, _ in part.kinds() for token in kind.control}
    found = [part.take(part.of_kind(lambda kind: kind.control)) for part in parts]
    what = f"rows with control tokens in their text, read as such ({', '.join(list(tokens)[:3])})"
    sources = [row.source for row in islice(chain.from_iterable(found), LISTED)]
    to_do = "Write them otherwise, such as with a space, where the model is not to obey them."
    return QualityWarning(what, sum(map(len, found)), sources, to_do) if tokens else None


def beyond_context(parts: Sequence[EncodedRows], context: int) -> QualityWarning | None:
    """The rows longer than `context`, the tokens that the model's positions were made for (0: not known)."""
    long = [part.take(part.lengths > context) for part in parts if context > 0]
    sources = [f"{row.source} ({len(row.ids)})" for row in islice(chain.from_iterable(long), LISTED)]
    what = f"rows are longer than the model's context of {context} tokens"
    to_do = f"It was not made for such positions: --max-length {context} keeps within it."
    return QualityWarning(what, sum(map(len, long)), sources, to_do) if sources else None


@dataclass(frozen=True)
class _Part:
    """Rows of one or more parts of a data set."""

    facts: Facts
    sources: list[Sequence[str]]

    @staticmethod
    def joined(parts: list["_Part"]) -> "_Part":
        return _Part(Facts.joined([part.facts for part in parts]), [names for part in parts for names in part.sources])

    def warning(self, what: str, rows: np.ndarray, to_do: str) -> QualityWarning:
        """About these rows: which of them, or their indices in order."""
        indices = np.flatnonzero(rows) if rows.dtype == bool else rows
        return QualityWarning(what, len(indices), [self._source(int(index)) for index in indices[:LISTED]], to_do)

    def _source(self, index: int) -> str:
        for sources in self.sources:
            if index < len(sources):
                return sources[index]
            index -= len(sources)
        raise IndexError


def _repeated(facts: Facts) -> np.ndarray:
    """[N] bool: rows whose contents an earlier row has."""
    repeats = np.ones(len(facts.contents), bool)
    repeats[np.unique(facts.contents, return_index=True)[1]] = False
    return repeats


def _contradicting(facts: Facts) -> np.ndarray:
    """The first row of each answer to a prompt that has several, those of one prompt together."""
    first = ~_repeated(facts) & ~facts.are(TEXT)
    rows = np.flatnonzero(first)
    _, earliest, group, counts = np.unique(
        facts.prompts[rows], return_index=True, return_inverse=True, return_counts=True
    )
    several = counts[group] > 1
    order = np.lexsort((rows[several], earliest[group][several]))
    return rows[several][order]

"""What the texts of training rows have in common: near-duplicates, repeated answers, scripts, personal data.

Of a large data set a sample is read, so that a million rows take no longer than twenty thousand.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.backend import Progress
from common.data.dataset import Counted, Example
from common.data.facts import facts_of, take
from common.data.personal import personal

SAMPLED = 20_000  # rows that are read at most: about ten seconds on one core
SCRIPTS_SAMPLED = 2_000  # rows whose script alone is told: a tenth of a second
ALIKE = 0.8  # Jaccard similarity of the five-letter pieces of two texts from which on they are near-duplicates
_PIECE = 5  # letters: for Japanese as for English
_READ = 4_000  # letters of a text that are compared
_SHORT = 20  # letters: shorter texts, such as names of classes, are to be alike
_TOGETHER = 100  # rows whose pieces are in memory at once
_SCRIPT_READ = 500  # letters of an answer by which its script is known
_FEWEST_LETTERS = 8  # of an answer whose script is told; of Han, Kana and Hangul a third
_DENSE = ("Kana", "Han", "Hangul")


@dataclass
class TextSample:
    """What was found in `rows` of `of` training rows. Lists name sources of rows."""

    rows: int
    of: int
    answers: int = 0  # all but plain text
    commonest: tuple[str, int] = ("", 0)  # the answer that most rows have, and how many have it
    alike_rows: Counted[str] = field(default_factory=Counted)  # nearly an earlier row, but not equal to it
    alike_answers: Counted[str] = field(default_factory=Counted)  # nearly or just an earlier row's
    scripts: dict[str, Counted[str]] = field(default_factory=dict)  # of the answers
    personal: dict[str, Counted[str]] = field(default_factory=dict)  # by kind: `a.jsonl:3 (jo.***)`

    @property
    def all(self) -> bool:
        return self.rows == self.of


def text_sample(rows: Sequence[Example], seed: int, progress: Progress = lambda share, text: None) -> TextSample:
    """Reads the rows, or SAMPLED of them, drawn by `seed`. Nothing leaves this process."""
    chosen = np.arange(len(rows))
    if len(rows) > SAMPLED:
        chosen = np.sort(np.random.default_rng([seed, 4]).choice(len(rows), SAMPLED, replace=False))
    sample = TextSample(len(chosen), len(rows))
    _, first = np.unique(facts_of(rows).contents[chosen], return_index=True)
    repeats = np.isin(np.arange(len(chosen)), first, invert=True)
    systems = set[str]()  # one is often that of every row: it is searched once
    alike_rows, alike_answers, answers = _NearDuplicates(), _NearDuplicates(), Counter[str]()
    for at, row in enumerate(take(rows, chosen)):
        progress(at / len(chosen), row.source)
        text, answer = _texts(row)
        if not repeats[at] and len(text) >= _SHORT:
            alike_rows.add(row.source, text)
        searched = [text, *(part for part in _beside(row) if part not in systems)]
        systems |= {*searched[1:]}
        for kind, masked in personal("\n".join(searched)):
            sample.personal.setdefault(kind, Counted()).add(f"{row.source} ({masked})")
        if (script := _script(text if answer is None else answer, text)) is not None:
            sample.scripts.setdefault(script, Counted()).add(row.source)
        if answer is not None:
            answers[answer[:_READ]] += 1
            if len(answer) >= _SHORT:
                alike_answers.add(row.source, answer)
    sample.alike_rows, sample.alike_answers = alike_rows.found(), alike_answers.found()
    sample.answers = answers.total()
    sample.commonest = next(iter(answers.most_common(1)), ("", 0))
    return sample


def scripts_of(rows: Sequence[Example], seed: int) -> dict[str, int]:
    """How many answers have each script, the commonest first, of at most SCRIPTS_SAMPLED rows drawn by `seed`."""
    chosen = np.arange(len(rows))
    if len(rows) > SCRIPTS_SAMPLED:
        chosen = np.sort(np.random.default_rng([seed, 5]).choice(len(rows), SCRIPTS_SAMPLED, replace=False))
    texts = map(_texts, take(rows, chosen))
    found = (_script(text if answer is None else answer, text) for text, answer in texts)
    return dict(Counter(script for script in found if script is not None).most_common())


def _texts(row: Example) -> tuple[str, str | None]:
    """`(the row's text without its system turn, its last answer)`; None for plain text, and for calls alone."""
    if row.text is not None:
        return row.text, None
    turns = [message for message in row.messages if message["role"] != "system"]
    answer = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
    return "\n".join(message["content"] for message in turns), answer.strip() or None


def _beside(row: Example) -> list[str]:
    """What `_texts` leaves out: system turns, and the arguments of calls."""
    turns = [message for message in row.messages if message["role"] == "system"]
    calls = [message["tool_calls"] for message in row.messages if message.get("tool_calls")]
    return [*(turn["content"] for turn in turns), *(json.dumps(call, ensure_ascii=False) for call in calls)]


class _NearDuplicates:
    """Texts that are nearly an earlier one, found by MinHash."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator

        self._index = RMinHashDeduplicator(threshold=ALIKE, num_perm=128, use_lsh=True)
        self._waiting: list[tuple[str, list[str]]] = []
        self._found = Counted[str]()
        self._count = 0

    def add(self, source: str, text: str) -> None:
        read = " ".join(text[:_READ].lower().split())
        self._waiting.append((source, [read[at : at + _PIECE] for at in range(max(1, len(read) - _PIECE + 1))]))
        if len(self._waiting) == _TOGETHER:
            self._compare()

    def found(self) -> Counted[str]:
        self._compare()
        return self._found

    def _compare(self) -> None:
        pairs = [(str(self._count + at), pieces) for at, (_, pieces) in enumerate(self._waiting)]
        self._count += len(pairs)
        for (source, _), new in zip(self._waiting, self._index.add_pairs(pairs), strict=True):
            if not new:
                self._found.add(source)
        self._waiting = []


def _script(answer: str, row: str) -> str | None:
    """The script that most letters of the answer have; None for few letters. Kana in the row makes Han Japanese."""
    counts = Counter[str]()
    for script, length in _runs(answer[:_SCRIPT_READ]):
        counts[script] += length * (3 if script in _DENSE else 1)
    if counts.total() < _FEWEST_LETTERS:
        return None
    if counts["Kana"] or (counts["Han"] and any(script == "Kana" for script, _ in _runs(row[:_SCRIPT_READ]))):
        counts["Japanese"] = counts.pop("Kana", 0) + counts.pop("Han", 0)
    return counts.most_common(1)[0][0]


def _runs(text: str) -> Iterator[tuple[str, int]]:
    import regex

    for match in regex.finditer(_SCRIPTS, text):
        yield str(match.lastgroup), len(match[0])


_SCRIPTS = "|".join(
    [
        r"(?P<Kana>[\p{Hiragana}\p{Katakana}ー]+)",
        *(
            rf"(?P<{script}>\p{{{script}}}+)"
            for script in ("Latin", "Han", "Hangul", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Thai")
        ),
        r"(?P<other>\p{L}+)",
    ]
)

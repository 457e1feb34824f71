"""Whether data is fit to train on, and what to do about it. Every threshold is here, with the reason for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.findings import BROKEN_OFF, LEFT_IN, REPEATS, SEVERAL_ANSWERS, QualityWarning
from common.data.personal import hidden
from common.data.text_sample import TextSample
from common.data.training_rows import TrainingRows
from common.data.truncation import FilteredRows
from common.options import Options

LEAST_ROWS = 10  # OpenAI's fine-tuning takes no fewer
FEW_ROWS = 100  # OpenAI's guide: improvements show with 50 to 100 rows
FEW_TEXT_TOKENS = 20_000  # of plain text, whose rows may be of any length: a hundred rows of 200
LEFT_OUT, MOSTLY_LEFT_OUT = 0.1, 0.5  # share of the rows; a tenth is what train says again at its end
LOW_LABEL_SHARE = 0.01  # of 100 tokens that are computed less than one teaches anything
MANY_PLACEHOLDERS = 0.1  # share of the rows: the model will write them
# Share of the rows up to which these change little: they are warned of, and no part of the verdict.
SOME = {REPEATS: 0.05, SEVERAL_ANSWERS: 0.05, BROKEN_OFF: 0.02}
# Share of the rows with one answer: from the first on other answers are the exception, from the second on hardly any.
ONE_ANSWER, ONLY_ANSWER = 0.6, 0.9
# Share of near-duplicates. The example has 1 % of such answers, 1,000 rows of WikiSQL 2 % and 3 % of such rows.
ALIKE_ANSWERS, ALIKE_ROWS = 0.05, 0.1
ODD_SCRIPT = 0.05  # share of the answers up to which a script is an exception; above it the data has several languages
ENOUGH_ANSWERS = 50  # of which a share of 5 % can be told
KNOWN = 0.5  # share of the drawn rows that the base model answers word for word
_LONG = 99  # percentile of the rows' lengths that is proposed as --max-length


@dataclass(frozen=True)
class Advice:
    """One thing to look at."""

    what: str
    to_do: str
    serious: bool = False  # data with it is not fit to train on
    sources: Sequence[str] = ()  # of the first rows that it is about

    def __str__(self) -> str:
        shown = f" ({', '.join(self.sources[:3])}{', ...' if len(self.sources) > 3 else ''})" if self.sources else ""
        return f"{self.what}{shown}. {self.to_do}"


def verdict(advice: Sequence[Advice]) -> str:
    """In one line."""
    if serious := [one.what for one in advice if one.serious]:
        return f"Verdict: not fit to train on: {'; '.join(serious)}."
    if advice:
        return f"Verdict: usable, {len(advice)} {'thing' if len(advice) == 1 else 'things'} to look at."
    return "Verdict: ready."


def ordered(advice: Sequence[Advice]) -> list[Advice]:
    """What is serious first."""
    return sorted(advice, key=lambda one: not one.serious)


def of_warnings(warnings: Sequence[QualityWarning], rows: int) -> list[Advice]:
    """rows: of the data in all."""
    return [
        Advice(
            f"{warning.count} {warning.what}",
            warning.to_do,
            warning.what == LEFT_IN and warning.count >= MANY_PLACEHOLDERS * rows,
            warning.sources,
        )
        for warning in warnings
        if warning.count > SOME.get(warning.what, 0) * rows
    ]


def of_rows(options: Options, rows: TrainingRows) -> list[Advice]:
    """What counts and lengths say; no text is read."""
    every = rows.train.every
    count = len(np.unique(every.rows)) - len(np.unique(rows.train.unlabeled.rows))
    found = []
    more = "Add rows, such as other ways to ask the same."
    if every and all(kind.text for kind, _ in every.kinds()):
        if (labels := int(every.label_tokens.sum())) < FEW_TEXT_TOKENS:
            found.append(Advice(f"{labels:,} tokens of text are few", "Add text."))
    elif count < FEW_ROWS:
        said = "are too few" if count < LEAST_ROWS else "are few"
        found.append(Advice(f"{count} training rows {said}", more, count < LEAST_ROWS))
    if bad := len(rows.data.bad) + len(rows.bad):
        places = [*(place for place, _ in rows.data.bad.first), *(row.source for row in rows.bad.first)]
        what = f"{bad} rows that cannot be read or labeled are dropped"
        found.append(Advice(what, "The table above says why.", sources=places))
    found += _of_lengths(options, rows.train)
    if every and every.label_tokens.sum() < LOW_LABEL_SHARE * every.lengths.sum():
        share = every.label_tokens.sum() / every.lengths.sum()
        to_do = "Shorten the prompts, or train the other turns too (--train-on)."
        found.append(Advice(f"only {share:.1%} of the tokens carry loss", to_do))
    return found


def _of_lengths(options: Options, rows: FilteredRows) -> list[Advice]:
    every, found = rows.every, []
    if len(rows.unlabeled) > LEFT_OUT * len(every):
        what = f"{len(rows.unlabeled)} of {len(every)} training rows have no label token"
        found.append(Advice(what, "check-data --explain shows why.", sources=_sources(rows.unlabeled)))
    refused = options.overflow == "error"
    cut = rows.dropped or rows.truncated
    share = len(cut) / max(1, len(every))
    if share > LEFT_OUT or (refused and cut):
        length = -(-int(np.percentile(every.lengths, _LONG)) // 64) * 64
        how = "refused" if refused else "dropped" if rows.dropped else "truncated"
        what = f"{len(cut)} of {len(every)} training rows are longer than --max-length {options.max_length}: {how}"
        to_do = f"--max-length {length} keeps {_LONG} of 100 rows whole."
        found.append(Advice(what, to_do, refused or (how == "dropped" and share > MOSTLY_LEFT_OUT), _sources(cut)))
    return found


def _sources(rows: Sequence) -> list[str]:
    return [row.source for row in rows[:5]]


def of_texts(sample: TextSample) -> list[Advice]:
    """What the texts of the rows say, or of a sample of them."""
    of, found = "" if sample.all else f" in {sample.rows:,} drawn rows", list[Advice]()
    for kind, rows in sample.personal.items():
        what = f"{len(rows)} places with {_a(kind)}{of}"
        found.append(
            Advice(what, "Remove what is not meant for everybody: the model may repeat it.", sources=rows.first)
        )
    answer, count = sample.commonest
    if sample.answers >= LEAST_ROWS and count >= ONE_ANSWER * sample.answers:
        what = f"{count} of {sample.answers} answers are the same ({hidden(answer)[:40]!r})"
        to_do = "Add rows with other answers: the model learns to give this one to everything."
        found.append(Advice(what, to_do, count >= ONLY_ANSWER * sample.answers))
    elif len(sample.alike_answers) > ALIKE_ANSWERS * max(sample.answers, LEAST_ROWS):
        what = f"{len(sample.alike_answers)} of {sample.answers} answers are nearly an earlier one's"
        to_do = "Write them in more ways: the model learns alike answers by heart."
        found.append(Advice(what, to_do, sources=sample.alike_answers.first))
    if len(sample.alike_rows) > ALIKE_ROWS * sample.rows:
        what = f"{len(sample.alike_rows)} of {sample.rows} rows are nearly an earlier one"
        found.append(Advice(what, "Leave such rows out: they teach little more.", sources=sample.alike_rows.first))
    total = sum(map(len, sample.scripts.values()))
    for script, rows in sample.scripts.items():
        if len(rows) <= ODD_SCRIPT * total and total >= ENOUGH_ANSWERS:
            what = f"{len(rows)} of {total} answers are in {script} script, unlike the others"
            found.append(Advice(what, "Check that they are meant to be.", sources=rows.first))
    return found


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "eI" else f"a {kind}"


def of_base(answered: int, asked: int) -> list[Advice]:
    """answered: the drawn rows that the base model answers word for word."""
    if not asked or answered < KNOWN * asked:
        return []
    what = f"the base model already answers {answered} of {asked} drawn rows word for word"
    return [Advice(what, "Train on rows that it does not know.")]


def serious_line(advice: Sequence[Advice]) -> str:
    """For train: the serious findings in one line, or nothing."""
    serious = [one.what for one in advice if one.serious]
    return f"not fit to train on: {'; '.join(serious)} (check-data says what to do)" if serious else ""

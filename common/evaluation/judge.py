"""Losses and answers of every subject, then the figures: side by side, and against the base on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.backend import Progress
from common.data.dataset import Example
from common.data.encode import Encoded
from common.data.encoded_rows import row_digest
from common.display import Display
from common.errors import UserError
from common.evaluation.answer_file import AnswerFile, answer_file, key_of
from common.evaluation.bootstrap import Estimate, FromSums, difference, estimate, mean
from common.evaluation.metrics import Metric
from common.evaluation.rows import JudgedRow, said
from common.evaluation.subjects import Opened, Subject
from common.inference.answers import ask_all
from common.sampling import Sampling

_ASKED = 2  # of the way in which prompts are made: an answer to another prompt is not used again
_SAFE = str.maketrans({letter: "_" for letter in '/\\:\0 *?"<>|'})


@dataclass(frozen=True)
class Evaluation:
    """What is judged and how. Answers are asked for where a metric needs them."""

    rows: list[JudgedRow]
    metrics: list[Metric]
    folder: Path
    context: int  # tokens of the longest row whose loss is taken
    max_tokens: int
    seed: int

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=0, seed=0, max_tokens=self.max_tokens)

    @cached_property
    def with_loss(self) -> dict[int, Encoded]:
        """The rows whose loss is taken, by number."""
        rows = {n: row.encoded for n, row in enumerate(self.rows) if row.encoded is not None}
        return {n: row for n, row in rows.items() if len(row.ids) <= self.context}

    @cached_property
    def asked(self) -> dict[int, Example]:
        """The prompts that are answered, by the number of the row."""
        return {n: row.prompt for n, row in enumerate(self.rows) if row.prompt is not None} if self.metrics else {}


@dataclass
class Judged:
    """What one subject gave, by row: losses and their weights, answers, and why prompts were refused."""

    subject: Subject
    losses: dict[int, dict[str, float]] = field(default_factory=dict)
    answers: dict[int, dict[str, str]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


def judge(subject: Subject, given: Evaluation, display: Display) -> Judged:
    """The subject's losses and answers; of those that are kept already none is made again."""
    found, folder = Judged(subject), given.folder / "answers"
    with answer_file(folder / f"{subject.name.translate(_SAFE)}.jsonl") as kept:
        losses = {n: _loss_key(subject, row) for n, row in given.with_loss.items() if subject.has_loss}
        answers = {n: _answer_key(subject, prompt, given) for n, prompt in given.asked.items()}
        left = [n for n, key in losses.items() if kept.get(key) is None]
        unanswered = [n for n, key in answers.items() if kept.get(key) is None]
        if left or unanswered:
            with subject.open() as model:
                if left:
                    _take_losses(model, given, {n: losses[n] for n in left}, kept, subject.name, display)
                if unanswered:
                    with display.stage(f"{subject.name}: answers") as progress:
                        wanted = {n: answers[n] for n in unanswered}
                        found.refused = _ask(model, given, wanted, kept, subject.slots, progress)
        found.losses = {n: kept.get(key) or {} for n, key in losses.items()}
        found.answers = {n: kept.get(key) or {} for n, key in answers.items() if n not in found.refused}
    return found


def _loss_key(subject: Subject, row: Encoded) -> str:
    return key_of(subject.identity, "loss", row_digest(row).hex())


def _answer_key(subject: Subject, prompt: Example, given: Evaluation) -> str:
    return key_of(subject.identity, "answer", _ASKED, given.max_tokens, given.context, prompt.messages, prompt.tools)


def _take_losses(
    model: Opened, given: Evaluation, keys: dict[int, str], kept: AnswerFile, name: str, display: Display
) -> None:
    encoded = {n: given.with_loss[n] for n in keys}
    with (
        model.losses(max(len(row.ids) for row in encoded.values())) as loss_of,
        display.stage(f"{name}: losses") as progress,
    ):
        for count, (n, row) in enumerate(encoded.items(), 1):
            loss, weight = loss_of(row)
            kept.add(keys[n], {"row": row.source, "loss": loss, "weight": weight})
            progress(count / len(encoded), f"{count} of {len(encoded)}")


def _ask(
    model: Opened, given: Evaluation, keys: dict[int, str], kept: AnswerFile, slots: int, progress: Progress
) -> dict[int, str]:
    """Ask for these rows' answers, and keep them; those that were refused are returned with the reason."""
    prompts = {n: given.asked[n] for n in keys}
    refused, done = dict[int, str](), 0

    def keep(n: int, row: dict[str, Any]) -> None:
        nonlocal done
        if row["finish"] == "error":
            refused[n] = row["error"]
        else:
            answer = row["messages"][-1]["content"]
            kept.add(keys[n], {"row": given.rows[n].source, "answer": answer, "finish": row["finish"]})
        done += 1
        progress(done / len(keys), f"{done} of {len(keys)}")

    with model.answers() as chat_model:
        ask_all(chat_model, prompts, given.sampling, slots, keep)
    return refused


@dataclass(frozen=True)
class Scores:
    """Of one metric: statistics [N, S] of each subject, by name, over the same rows."""

    name: str
    rows: list[int]
    figure: FromSums
    statistics: dict[str, np.ndarray]

    @cached_property
    def place(self) -> dict[int, int]:
        """By row, its place among these."""
        return {n: place for place, n in enumerate(self.rows)}

    def estimates(self, seed: int) -> dict[str, Estimate]:
        return {name: estimate(found, self.figure, seed) for name, found in self.statistics.items()}

    def differences(self, seed: int) -> dict[str, Estimate]:
        """Of every other subject to the base, where that is judged."""
        base = self.statistics.get("base")
        others = {name: found for name, found in self.statistics.items() if name != "base"}
        return {} if base is None else {n: difference(s, base, self.figure, seed) for n, s in others.items()}

    @property
    def is_share(self) -> bool:
        """Whether each answer has 0 or 1."""
        every = np.concatenate(list(self.statistics.values()))
        return self.figure is mean and self.name != "loss" and bool(np.isin(every[:, 0], (0, 1)).all())


def scores_of(given: Evaluation, judged: Sequence[Judged]) -> list[Scores]:
    """By metric, the loss first. Rows that any subject refused are left out for all.

    Raises UserError where a scorer fails, and where no row is left.
    """
    found: list[Scores] = []
    with_loss = [one for one in judged if one.subject.has_loss]
    if given.with_loss and with_loss:
        pairs = {
            one.subject.name: np.array([(kept["loss"], kept["weight"]) for kept in one.losses.values()])
            for one in with_loss
        }
        found.append(Scores("loss", [*given.with_loss], mean, pairs))
    refused = {n for one in judged for n in one.refused}
    for metric in given.metrics:
        rows = [n for n in compared(given, metric) if n not in refused]
        if not rows:
            reason = next(why for one in judged for why in one.refused.values())
            raise UserError(f"Every prompt was refused: {reason}", "Give a larger --context where that is too small.")
        statistics = {
            one.subject.name: np.array(
                [metric.statistics(given.rows[n], said(one.answers[n]["answer"])) for n in rows], np.float64
            )
            for one in judged
        }
        found.append(Scores(metric.name, rows, metric.figure, statistics))
    return found


def compared(given: Evaluation, metric: Metric) -> list[int]:
    """The rows that the metric can judge."""
    return [n for n in given.asked if given.rows[n].reference is not None or not metric.compares]

"""Signs that a training collapses: each with what was seen, the usual cause and the remedy."""

import math
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from common.data.message_forms import after_reasoning

# Thresholds. _RISEN and _DRIFT lie between good runs and faults of SmolLM2-135M, _FORGOTTEN between those of
# Gemma-3-270M: `python -m benchmarks.collapse`.
_WINDOW = 16  # steps that a step is compared with; before there are so many, with the first _IN_A_ROW
_SPIKE, _SPIKE_NATS = 1.5, 1.0  # a loss so many times the median of those, and so much above it
_GRADIENT = 20.0  # a gradient norm so many times their median
_IN_A_ROW, _AT_FIRST = 3, 5  # steps; so many where the comparison is with the first ones
_RISEN = 1.3  # a validation loss so many times the best
_WORSE = 1.05  # and so many times the one before training
_REPEATED, _NGRAM, _TEXT = 0.5, 12, 60  # share of repeated n-grams of characters, in an answer at least so long
_ALIKE_ALL = 0.25  # of what the rows' own answers differ by
_LONGER = 1.5  # an answer without an end so many times as long as the row's own
_COMMON, _ALIKE = 3, 0.3  # characters of an n-gram, and the share in common of answers that are alike
_QUOTED = 40  # characters of an answer
_MARKER = re.compile(r"<\|[^|<>\s]{2,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
_DRIFT = 3.5  # nats of KL divergence a token, from the base, on prompts outside of the data
_HIGHER, _HIGHER_NATS = 1.05, 0.01  # a validation loss so many times the best, and so much above that
_FORGOTTEN = 1.0  # nats a token by which their right answers are less likely than before training

_RATE = "lower --learning-rate to a third"
_TEMPLATE = "leave out --chat-template, or look at check-data --explain 1"
_SHORTER = "fewer --epochs, or more rows; the adapter with the lowest validation loss is kept"


@dataclass(frozen=True)
class Alarm:
    """name: what the record calls it. since: the step from which on it was seen. quote: from an answer."""

    name: str
    seen: str
    cause: str
    remedy: str
    since: int
    quote: str = ""

    @property
    def of_rate(self) -> bool:
        """Whether a lower learning rate may help."""
        return self.remedy in (_RATE, _SHORTER)

    def __str__(self) -> str:
        quoted = f": {self.quote!r}" if self.quote else ""
        return f"{self.seen}{quoted}. Usual cause: {self.cause}. Remedy: {self.remedy}"


@dataclass
class Alarms:
    """What a run has shown so far. Every alarm is raised once.

    warmup: steps whose figures say little. overfitting: whether it is news that the validation loss rises; not where
    patience ends the training then, nor of a few rows. known: names of alarms that were raised before this process.
    """

    warmup: int
    overfitting: bool = True
    known: set[str] = field(default_factory=set)
    start_valid_loss: float | None = None
    raised: list[Alarm] = field(default_factory=list)
    quiz: dict[int, float] = field(default_factory=dict)  # by step the loss of its right answers
    _first: list[float] = field(default_factory=list)  # losses
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _spikes: int = 0
    _steep: int = 0
    _best: tuple[float, float] | None = None  # the best validation loss, and the training loss then
    _last: float = 0.0  # validation loss
    _risen: int = 0
    _signs: dict[str, int] = field(default_factory=dict)  # in the last answers, and since which step
    _before: tuple[float, float] | None = None  # drift and loss of the quiz before the first step

    def see(self, line: dict[str, Any]) -> list[Alarm]:
        """Of any line in metrics.jsonl, or of drift in samples.jsonl; nothing of one that lacks its figures."""
        names: list[str] = [name for name in ("drift", "valid_loss") if name in line] or ["loss", "grad_norm"]
        names += ["quiz_loss"] if "drift" in line else []
        if not all(isinstance(line.get(name), int | float) for name in ("step", *names)):
            return []
        if "drift" in line:
            return self.drift(line["step"], line["drift"], line["quiz_loss"])
        return self.validation(line) if "valid_loss" in line else self.step(line)

    def step(self, line: dict[str, Any]) -> list[Alarm]:
        """Of a step's line in metrics.jsonl."""
        loss, norm, step = line["loss"], line["grad_norm"], line["step"]
        full = len(self._losses) == _WINDOW
        usual = median(self._losses if full else self._first) if len(self._first) == _IN_A_ROW else math.inf
        spike = step > self.warmup and loss > max(_SPIKE * usual, usual + _SPIKE_NATS)
        steep = full and norm > _GRADIENT * median(self._norms)
        self._spikes, self._steep = (
            count + 1 if seen else 0 for count, seen in ((self._spikes, spike), (self._steep, steep))
        )
        found = []
        if self._spikes == (needed := _IN_A_ROW if full else _AT_FIRST):
            seen = f"the loss jumped to {loss:.2f} at step {step}, from about {usual:.2f}"
            found.append(Alarm("loss", seen, "a learning rate that is too high", _RATE, step - needed + 1))
        if self._steep == _IN_A_ROW:
            seen = f"the gradient norm is {norm:.3g} at step {step}, and was about {median(self._norms):.3g}"
            cause = "a learning rate that is too high, or faulty rows"
            found.append(Alarm("gradient", seen, cause, _RATE, step - _IN_A_ROW + 1))
        if len(self._first) < _IN_A_ROW:
            self._first.append(loss)
        if step > self.warmup:
            if not spike:
                self._losses.append(loss)
            if not steep:
                self._norms.append(norm)
        return self._raise(found)

    def validation(self, line: dict[str, Any]) -> list[Alarm]:
        """Of a validation's line in metrics.jsonl."""
        loss, step = line["valid_loss"], line["step"]
        if not step:
            self.start_valid_loss = loss
            return []
        trained = fmean(self._losses) if self._losses else 0.0
        if self._best is None or loss < self._best[0]:
            self._best = loss, trained
        best, then = self._best
        self._last = loss
        self._risen = self._risen + 1 if loss > _RISEN * best and trained < then else 0
        found = []
        if self._risen == 2 and self.overfitting:
            seen = (
                f"the validation loss rose from {best:.3f} to {loss:.3f} at step {step}, while the training loss fell"
            )
            found.append(Alarm("overfitting", seen, "too many passes over too few rows", _SHORTER, step))
        if self.start_valid_loss is not None and step > self.warmup and loss > _WORSE * self.start_valid_loss:
            seen = (
                f"the validation loss is {loss:.3f} at step {step}, above {self.start_valid_loss:.3f} before training"
            )
            cause = "a learning rate that is too high, or rows of another form"
            found.append(Alarm("worse", seen, cause, _RATE, step))
        return self._raise(found)

    def answers(self, step: int, answers: Sequence[dict[str, Any]], last: bool = False) -> list[Alarm]:
        """Of the lines in samples.jsonl after one validation. A sign counts when it is seen twice in a row.

        last: after the last validation, where it counts at once: a short run is asked at no other.
        """
        if not step or len(answers) < 2:  # one answer says little
            return []
        texts = [line["answer"] for line in answers]
        own = [line["reference"] for line in answers if line["reference"]]
        found: list[Alarm] = []

        def sign(name: str, seen: str, cause: str, remedy: str, quote: str = "") -> None:
            since = self._signs.get(name, step)
            found.append(Alarm(name, f"{seen} at step {step}", cause, remedy, since, quote))

        if len(loops := [text for text in texts if repetition(text) > _REPEATED]) * 2 > len(texts):
            cause = "too many steps, or too high a learning rate"
            sign("repetition", "answers repeat themselves", cause, _SHORTER, loops[0][-_QUOTED:])
        if sum(not text.strip() for text in texts) * 2 > len(texts) and own:
            sign("empty", "answers are empty", "rows with empty answers, or an end token that is learned first", _RATE)
        endless = [line for line in answers if line["reference"] and not line["ended"] and _much_longer(line)]
        if len(endless) * 2 > len(own) > 0:
            cause = "a template without an end of turn, or one that differs from training"
            sign("endless", "answers do not end", cause, "look at check-data --explain 1: the end must be a label")
        copies = [line["answer"] for line in answers if line.get("copied") and line["reference"] and _unlike(line)]
        if len(copies) * 2 > len(own) > 1:
            cause = "too many passes over too few rows"
            sign("copies", "answers are copied from training rows", cause, _SHORTER, copies[0][:_QUOTED])
        if marked := [text for line in answers if (text := _marker(line))]:
            cause = "prompts in another chat template than the rows that were trained on"
            sign("markers", "answers show a chat template's markers", cause, _TEMPLATE, marked[0])
        right = sum(line["answer"].strip() == line["reference"].strip() for line in answers if line["reference"])
        as_far = [line["reference"][: None if line["ended"] else len(line["answer"])] for line in answers]
        differ = difference([text for text in as_far if text])
        if difference(texts) < _ALIKE_ALL * differ and right * 2 < len(own):  # few kinds of answers may be alike
            every = (
                "every prompt has the same answer" if len({*texts}) == 1 else "all prompts have almost the same answer"
            )
            cause, remedy = "a learning rate that is too high", _RATE
            if sum(bool(line.get("known", line.get("copied"))) for line in answers) * 2 > len(texts):
                cause, remedy = "one answer in most rows", "vary the rows"
            sign("same", every, cause, remedy, texts[0][:_QUOTED])
        before, self._signs = self._signs, {alarm.name: alarm.since for alarm in found}
        return self._raise(alarm for alarm in found if last or alarm.name in before)

    def drift(self, step: int, nats: float, quiz_loss: float) -> list[Alarm]:
        """See `common.evaluation.drift.Drift`.

        A base model that learns to answer moves far too, but then right answers become more likely. One that learns a
        narrow task forgets, but then its validation loss is at its best. Nothing is known where the quiz was not asked
        before the first step.
        """
        self.quiz[step] = quiz_loss
        if not step:
            self._before = nats, quiz_loss  # a given adapter has moved already
            return []
        if self._before is None or nats <= _DRIFT + self._before[0] or quiz_loss <= _FORGOTTEN + self._before[1]:
            return []
        if self._best is not None:
            best = min(self._best[0], math.inf if self.start_valid_loss is None else self.start_valid_loss)
            if self._last <= _HIGHER * best + _HIGHER_NATS:
                return []
        seen = (
            f"on prompts outside of the data the model is {nats:.1f} nats a token from its base at step {step}, and "
            "gives their right answers much less probability than before training"
        )
        cause = "a learning rate that is too high, or too many steps"
        return self._raise([Alarm("drift", seen, cause, _RATE, step)])

    def _raise(self, found: Iterable[Alarm]) -> list[Alarm]:
        new = [alarm for alarm in found if alarm.name not in self.known]
        self.known |= {alarm.name for alarm in new}
        self.raised += new
        return new


def repetition(text: str) -> float:
    """Share of the text's n-grams of characters that it had before; 0 for a short text."""
    if len(text) < _TEXT:
        return 0.0
    grams = [text[at : at + _NGRAM] for at in range(len(text) - _NGRAM + 1)]
    return 1 - len({*grams}) / len(grams)


def difference(texts: Sequence[str]) -> float:
    """How much of the texts is not in another: 0 where all are the same, 1 where they have no n-gram in common.

    From distinct-n, over all texts: the share of their different n-grams among those of each by itself.
    """
    grams = [_grams(text, _NGRAM) for text in texts]
    if len(grams) < 2:
        return 0.0
    distinct = len(set().union(*grams)) / sum(map(len, grams))
    return (distinct - 1 / len(grams)) / (1 - 1 / len(grams))


def _grams(text: str, length: int) -> set[str]:
    """The text's n-grams of characters; of a shorter text itself."""
    return {text[at : at + length] for at in range(max(1, len(text) - length + 1))}


def _unlike(line: dict[str, Any]) -> bool:
    """Whether the answer has little in common with the row's own."""
    answer, own = (_grams(line[name].strip(), _COMMON) for name in ("answer", "reference"))
    return len(answer & own) < _ALIKE * min(len(answer), len(own))


def _marker(line: dict[str, Any]) -> str:
    """A chat template's marker that the answer shows as text; empty without one, or where the row's own has one."""
    found = _MARKER.search(after_reasoning(line["answer"]))  # whose tags are no such markers
    return "" if found is None or _MARKER.search(line["reference"] or "") else found[0]


def _much_longer(line: dict[str, Any]) -> bool:
    return len(line["answer"]) > _LONGER * len(line["reference"])

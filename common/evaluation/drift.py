"""How far a training has moved a model from its base, on questions that belong to no data set."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.backend import Backend
from common.data.dataset import Example
from common.data.encode import Encoder, MaskingOptions

QUIZ = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days does a week have?", "A week has seven days."),
    ("Name a color of the rainbow.", "Red is a color of the rainbow."),
    ("What do bees make?", "Bees make honey."),
    ("日本の首都はどこですか。", "日本の首都は東京です。"),
    ("一週間は何日ですか。", "一週間は七日です。"),
    ("空は何色ですか。", "空は青いです。"),
    ("氷は何からできますか。", "氷は水からできます。"),
)


@dataclass(frozen=True)
class Drift:
    """nats: KL divergence of the tuned model from its base, a label token. loss: of the right answers, a token."""

    nats: float
    loss: float


@dataclass
class Quiz:
    """The questions, as a model reads them. The base's probabilities are computed once.

    adapted: whether the base is the backend's model without its adapter; else it is the model as it is asked first.
    """

    encoder: Encoder
    adapted: bool
    _base: list[np.ndarray] = field(default_factory=list)

    @staticmethod
    def of(tokenizer: Any, thinking: str, adapted: bool = True) -> "Quiz":
        return Quiz(Encoder(tokenizer, MaskingOptions(thinking=thinking)), adapted)  # type: ignore[arg-type]

    def ask(self, backend: Backend) -> Drift:
        """Of the backend's model as it is now, against the base."""
        nats, losses = list[np.ndarray](), list[np.ndarray]()
        for number, (question, answer) in enumerate(QUIZ):
            turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            row = self.encoder(Example(turns, f"quiz:{number + 1}"))
            positions = np.flatnonzero(row.mask[1:])
            if number == len(self._base):
                self._base.append(_log_softmax(backend.logits(row.ids[:-1], not self.adapted, positions)))
            base, tuned = self._base[number], _log_softmax(backend.logits(row.ids[:-1], True, positions))
            nats.append((np.exp(tuned) * (tuned - base)).sum(axis=-1))
            losses.append(-tuned[np.arange(len(positions)), row.ids[1:][positions]])
        return Drift(float(np.concatenate(nats).mean()), float(np.concatenate(losses).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float32) - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found

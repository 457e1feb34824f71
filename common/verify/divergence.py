"""How far one model's next-token distributions are from another's, at positions whose next token is a label."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.data.encode import Encoded

KEPT_BYTES = 200_000_000  # of a reference's distributions, held in memory; never written to disk
_EXACT = 64  # positions whose logits are kept in float32 besides

# Logits [P, vocabulary] after the tokens at `positions` [P] of the row `ids` [T].
LogitsAt = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Positions:
    """The positions compared: of each row those that a label follows, evenly spread where there are many."""

    ids: list[np.ndarray]  # of each row, [T]
    positions: list[np.ndarray]  # in each row

    @property
    def count(self) -> int:
        return sum(map(len, self.positions))


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over `positions` tokens. kl: KL(reference || model) in nats."""

    mean_kl: float
    p99_kl: float
    same_top: float  # share of positions where both rank the same token first
    reference_perplexity: float
    perplexity: float  # of the labels
    max_logit: float  # largest difference of two logits over all tokens of the first 64 positions, float32
    positions: int


def choose_positions(rows: Sequence[Encoded], vocabulary: int, limit: int = 32) -> Positions:
    """Positions of at most `limit` rows, as many as KEPT_BYTES hold of distributions in two bytes a token."""
    chosen = rows[:limit]
    share = max(1, KEPT_BYTES // (2 * vocabulary) // max(1, len(chosen)))
    ids, positions = [], []
    for row in chosen:
        labels = np.flatnonzero(row.mask[1:])
        if len(labels) > share:
            labels = labels[np.linspace(0, len(labels) - 1, share).astype(int)]
        ids.append(row.ids)
        positions.append(labels)
    return Positions(ids, positions)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def apart(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Of logits [T, vocabulary], relative to the largest: the largest difference, and that of nearly every position."""
    found = np.abs(one - other) / np.abs(one).max()
    return float(found.max()), float(np.quantile(np.sqrt((found**2).mean(axis=1)), 0.25))


class Reference:
    """A model's distributions at `at`, kept as log-probabilities in float16 and normalized again on use.

    Rounding so moves a KL by less than it moves a probability: by about 1e-6, as tests/unit/test_divergence.py holds.
    """

    def __init__(self, at: Positions, logits_at: LogitsAt) -> None:
        self.at = at
        self._kept: list[np.ndarray] = []
        self._exact: list[np.ndarray] = []  # the first positions' logits
        for ids, positions in zip(at.ids, at.positions, strict=True):
            found = logits_at(ids, positions).astype(np.float32)
            self._kept.append(np.maximum(log_softmax(found), -60000).astype(np.float16))
            self._exact.extend(found[: _EXACT - len(self._exact)].copy())

    def divergence(self, logits_at: LogitsAt) -> Divergence:
        """The divergence of the model behind `logits_at`. A vocabulary that is padded further is cut to the shorter."""
        kls, same, nll, reference_nll, furthest = [], 0, 0.0, 0.0, 0.0
        for ids, positions, kept in zip(self.at.ids, self.at.positions, self._kept, strict=True):
            size = min(kept.shape[1], (found := logits_at(ids, positions)).shape[1])
            for number in range(len(positions)):
                ours = log_softmax(kept[number, :size].astype(np.float32))
                theirs = log_softmax(found[number, :size].astype(np.float32))
                kls.append(float(np.sum(np.exp(ours) * (ours - theirs), dtype=np.float64)))
                same += int(ours.argmax() == theirs.argmax())
                label = ids[positions[number] + 1]
                nll -= float(theirs[label])
                reference_nll -= float(ours[label])
                if len(kls) <= len(self._exact):
                    furthest = max(
                        furthest, float(np.abs(self._exact[len(kls) - 1][:size] - found[number, :size]).max())
                    )
        count = len(kls)
        return Divergence(
            mean_kl=float(np.mean(kls)),
            p99_kl=float(np.percentile(kls, 99)),
            same_top=same / count,
            reference_perplexity=float(np.exp(reference_nll / count)),
            perplexity=float(np.exp(nll / count)),
            max_logit=furthest,
            positions=count,
        )

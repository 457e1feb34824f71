"""How far one model's next-token distributions lie from another's, at positions that carry loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.data.encode import Encoded

KEPT_BYTES = 200_000_000  # of a reference's distributions, held in memory; never written to disk
_EXACT = 64  # positions whose logits are kept in float32 besides

# Logits [P, vocabulary] after the tokens at `positions` [P] of the row `ids` [T].
LogitsAt = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Rows, and in each the positions looked at: those that a label follows, evenly spread where they are many."""

    ids: list[np.ndarray]
    positions: list[np.ndarray]

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


def choose_rows(rows: Sequence[Encoded], vocabulary: int, limit: int = 32) -> Rows:
    """At most `limit` of the rows, and as many positions as KEPT_BYTES hold of distributions in two bytes a token."""
    chosen = rows[:limit]
    share = max(1, KEPT_BYTES // (2 * vocabulary) // max(1, len(chosen)))
    ids, positions = [], []
    for row in chosen:
        labels = np.flatnonzero(row.mask[1:])
        if len(labels) > share:
            labels = labels[np.linspace(0, len(labels) - 1, share).astype(int)]
        ids.append(row.ids)
        positions.append(labels)
    return Rows(ids, positions)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis, float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Reference:
    """A model's distributions at the rows' positions, kept as log-probabilities in float16 and normalized again on use.

    Rounding so moves a KL by less than it moves a probability: by about 1e-6, as tests/unit/test_divergence.py holds.
    """

    def __init__(self, rows: Rows, logits_at: LogitsAt) -> None:
        self.rows = rows
        self._kept: list[np.ndarray] = []
        self._exact: list[np.ndarray] = []  # the first positions' logits
        for ids, positions in zip(rows.ids, rows.positions, strict=True):
            found = logits_at(ids, positions).astype(np.float32)
            self._kept.append(np.maximum(log_softmax(found), -60000).astype(np.float16))
            self._exact.extend(found[: _EXACT - len(self._exact)].copy())

    @property
    def vocabulary(self) -> int:
        return int(self._kept[0].shape[1])

    def divergence(self, logits_at: LogitsAt) -> Divergence:
        """Of the model behind `logits_at`. Where one vocabulary is padded further it is cut: no row uses that."""
        kls, same, nll, reference_nll, furthest = [], 0, 0.0, 0.0, 0.0
        for ids, positions, kept in zip(self.rows.ids, self.rows.positions, self._kept, strict=True):
            size = min(kept.shape[1], (found := logits_at(ids, positions)).shape[1])
            for at in range(len(positions)):
                ours = log_softmax(kept[at, :size].astype(np.float32))
                theirs = log_softmax(found[at, :size].astype(np.float32))
                kls.append(float(np.sum(np.exp(ours) * (ours - theirs), dtype=np.float64)))
                same += int(ours.argmax() == theirs.argmax())
                label = ids[positions[at] + 1]
                nll -= float(theirs[label])
                reference_nll -= float(ours[label])
                if len(kls) <= len(self._exact):
                    furthest = max(furthest, float(np.abs(self._exact[len(kls) - 1][:size] - found[at, :size]).max()))
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

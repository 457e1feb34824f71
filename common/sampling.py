"""Sampling of the next token, the same for every backend, and the loop that generates with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

REPEAT_LAST = 64  # tokens that the repeat penalty looks back
# llama.cpp's own order; without a list it would also run samplers that are not ours
SAMPLERS = ("penalties", "top_k", "top_p", "min_p", "temperature")

Sampler = Callable[["np.ndarray", Sequence[int]], int]  # logits [vocabulary] float32 and the ids before -> an id


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Sampling:
    """The defaults are llama.cpp's."""

    temperature: float = _flag(0.8, "randomness of the next token; 0: always the likeliest")
    top_k: int = _flag(40, "sample from the k likeliest tokens; 0: from all")
    top_p: float = _flag(0.95, "sample from the likeliest tokens that together reach this probability; 1: from all")
    min_p: float = _flag(0.05, "sample from tokens at least this likely, as a share of the likeliest; 0: from all")
    repeat_penalty: float = _flag(1.0, "above 1: make the last 64 tokens less likely")
    seed: int | None = _flag(None, "seed of the sampling; the answers differ each time unless given")
    max_tokens: int = _flag(512, "most tokens of an answer")

    def check(self) -> None:
        """Raises UserError naming every option out of its range."""
        faults = [
            f"--{name.replace('_', '-')} {getattr(self, name)}: must be {wanted}"
            for name, right, wanted in (
                ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
                ("top_k", self.top_k >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
                ("repeat_penalty", 0 < self.repeat_penalty < float("inf"), "above 0 (1 does nothing)"),
                ("seed", self.seed is None or 0 <= self.seed < 2**32 - 1, "from 0 to 4294967294"),
                ("max_tokens", self.max_tokens >= 1, "1 or more"),
            )
            if not right
        ]
        if faults:
            raise UserError("\n".join(faults), "Correct them; `--help` says what each does.")

    def for_row(self, number: int) -> Sampling:
        """Of a batch's row: with a seed, one of its own."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % (2**32 - 1))

    def request(self) -> dict[str, Any]:
        """The same for llama-server's /v1/chat/completions; -1 draws a seed."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "repeat_last_n": REPEAT_LAST,
            "samplers": list(SAMPLERS),
            "seed": -1 if self.seed is None else self.seed,
            "max_tokens": self.max_tokens,
        }


def make_sampler(sampling: Sampling) -> Sampler:
    """A sampler that holds the random state of one answer; at temperature 0 it is greedy and draws nothing."""
    import numpy as np

    random = np.random.default_rng(sampling.seed)

    def sample(logits: np.ndarray, ids: Sequence[int]) -> int:
        values = penalized(np.asarray(logits, np.float64), ids[-REPEAT_LAST:], sampling.repeat_penalty)
        if sampling.temperature == 0:
            return int(values.argmax())
        chances = probabilities(values, sampling)
        return int(random.choice(len(chances), p=chances))

    return sample


def penalized(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Logits with those of `seen` ids lowered (Keskar et al. 2019, CTRL); a negative one is multiplied, not divided."""
    import numpy as np

    if penalty == 1.0 or not seen:
        return logits
    logits, ids = logits.copy(), np.unique(np.asarray(seen, np.int64))
    logits[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return logits


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [vocabulary] float64 after top-k, top-p and min-p, in this order, then temperature (above 0).

    The filters look at the probabilities before temperature, as llama.cpp's do; the likeliest token always stays.
    """
    import numpy as np

    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    chances = _softmax(logits[order])
    if sampling.top_p < 1:  # the token that reaches it stays
        order = order[: int(np.searchsorted(chances.cumsum(), sampling.top_p)) + 1]
        chances = _softmax(logits[order])
    if sampling.min_p:
        order = order[chances >= sampling.min_p * chances[0]]
    result = np.zeros(len(logits))
    result[order] = _softmax(logits[order] / sampling.temperature)
    return result


def _softmax(values: np.ndarray) -> np.ndarray:
    import numpy as np

    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def generate_tokens(
    forward: Callable[[list[int], bool], np.ndarray],
    token_ids: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampler: Sampler,
    rope_split: int | None,
) -> Iterator[int]:
    """Yield ids until one of `stop_ids`, which is not yielded, or `max_new_tokens` of them.

    `forward(ids, restart)` gives the logits after the last of `ids`, which follow those of earlier calls. With
    `restart` they are the row's first, and the cache of keys and values must be emptied. rope_split: longrope rotates
    all tokens of rows longer than this by other frequencies, so a row that passes it is computed again from its start.
    """
    ids, cached = [int(token) for token in token_ids], 0
    for _ in range(max_new_tokens):
        if rope_split is not None and cached <= rope_split < len(ids):
            cached = 0
        logits = forward(ids[cached:], cached == 0)
        cached = len(ids)
        token = sampler(logits, ids)
        if token in stop_ids:
            return
        yield token
        ids.append(token)

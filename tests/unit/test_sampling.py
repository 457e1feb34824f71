"""How a token is chosen: each cut by hand, the draw by its frequencies, and the loop that grows a row."""

from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from common.sampling import Sampling, generate_tokens, make_sampler, penalized, probabilities

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15]))
ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def chances(**changes) -> list[float]:
    return [round(float(p), 6) for p in probabilities(LOGITS, Sampling(**(ALL | changes)))]


def test_nothing_cut_is_the_models_own_distribution() -> None:
    assert chances() == [0.1, 0.4, 0.05, 0.3, 0.15]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 3, 4]),  # the token that reaches it stays
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),  # of 0.4: at least 0.12
        ({"min_p": 0.99}, [1]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # of the three that are left they have 0.82
    ],
)
def test_each_cut_leaves_the_rest_in_proportion(changes: dict[str, float], kept: list[int]) -> None:
    whole = np.exp(LOGITS)
    expected = np.where(np.isin(np.arange(5), kept), whole, 0)
    assert chances(**changes) == [round(float(p), 6) for p in expected / expected.sum()]


def test_temperature_comes_after_the_cuts() -> None:
    flat = probabilities(LOGITS, Sampling(**(ALL | {"temperature": 1e6, "top_p": 0.69})))
    np.testing.assert_allclose(flat, [0, 0.5, 0, 0.5, 0], atol=1e-6)
    sharp = probabilities(LOGITS, Sampling(**(ALL | {"temperature": 0.5})))
    np.testing.assert_allclose(sharp, np.exp(LOGITS) ** 2 / (np.exp(LOGITS) ** 2).sum())


def test_the_draw_follows_the_probabilities() -> None:
    pick = make_sampler(Sampling(**(ALL | {"seed": 7})))
    counts = Counter(pick(LOGITS, []) for _ in range(4000))
    np.testing.assert_allclose([counts[i] / 4000 for i in range(5)], np.exp(LOGITS), atol=0.03)


def test_a_seed_draws_the_same_again_and_no_seed_does_not() -> None:
    def drawn(seed: int | None) -> list[int]:
        pick = make_sampler(Sampling(**(ALL | {"seed": seed})))
        return [pick(LOGITS, []) for _ in range(60)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)
    assert Sampling(seed=2**32 - 2).for_row(3).seed == 2
    assert Sampling().for_row(3).seed is None


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    greedy = make_sampler(Sampling(temperature=0))
    assert greedy(LOGITS, [1, 1]) == 1
    assert make_sampler(Sampling(temperature=0, repeat_penalty=2.0))(LOGITS, [1, 1]) == 3


def test_the_penalty_lowers_a_logit_of_either_sign_once_and_forgets_after_64() -> None:
    logits = np.array([2.0, -2.0, 1.0])
    assert penalized(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]
    pick = make_sampler(Sampling(temperature=0, repeat_penalty=4.0))
    assert pick(logits, [0] + [1] * 63) == 2
    assert pick(logits, [0] + [1] * 64) == 0


def test_options_out_of_range_are_named_together() -> None:
    Sampling().check()
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=-1, top_p=0, min_p=1, repeat_penalty=0, seed=-1, max_tokens=0).check()
    names = [line.split(" ")[0] for line in caught.value.what.split("\n")]
    options = ("temperature", "top-k", "top-p", "min-p", "repeat-penalty", "seed", "max-tokens")
    assert names == [f"--{name}" for name in options]
    with pytest.raises(UserError, match="--temperature nan"):
        Sampling(temperature=float("nan")).check()


def test_llama_cpp_is_told_all_of_it() -> None:
    body = Sampling(temperature=0.5, top_k=3, top_p=0.6, min_p=0.1, repeat_penalty=1.2, max_tokens=9).request()
    assert (body["temperature"], body["top_k"], body["top_p"], body["min_p"]) == (0.5, 3, 0.6, 0.1)
    assert (body["repeat_penalty"], body["repeat_last_n"], body["seed"], body["max_tokens"]) == (1.2, 64, -1, 9)
    assert body["samplers"] == ["penalties", "top_k", "top_p", "min_p", "temperature"]


def test_a_row_grows_by_what_its_cache_lacks_and_stops() -> None:
    calls: list[tuple[list[int], bool]] = []

    def forward(ids: list[int], restart: bool) -> np.ndarray:
        calls.append((ids, restart))
        return np.eye(10)[(ids[-1] + 1) % 10]

    def first(logits: np.ndarray, ids: object) -> int:
        return int(logits.argmax())

    assert list(generate_tokens(forward, np.array([3, 4]), 9, [8], first, None)) == [5, 6, 7]
    assert calls == [([3, 4], True), ([5], False), ([6], False), ([7], False)]
    calls.clear()
    assert list(generate_tokens(forward, [3, 4], 2, [8], first, None)) == [5, 6]
    calls.clear()  # rows of more than three tokens turn otherwise
    assert list(generate_tokens(forward, [3, 4], 3, [], first, 3)) == [5, 6, 7]
    assert calls == [([3, 4], True), ([5], False), ([3, 4, 5, 6], True)]

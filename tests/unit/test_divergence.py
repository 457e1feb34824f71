"""How far one model lies from another, against float64 by hand; what is looked at, and what is kept of it."""

from dataclasses import replace

import numpy as np
import pytest

from common.data.encode import Encoded
from common.verify.divergence import KEPT_BYTES, Divergence, Positions, Reference, choose_positions
from common.verify.judge import better_quant, judge_fused, judge_quants, verdict

VOCABULARY = 500


def logits(seed: int, scale: float = 4.0) -> dict[bytes, np.ndarray]:
    random = np.random.default_rng(seed)
    return {row.tobytes(): random.normal(0, scale, (len(row), VOCABULARY)).astype(np.float32) for row in IDS}


IDS = [np.arange(12, dtype=np.int32), np.arange(40, 47, dtype=np.int32)]
ROWS = Positions(IDS, [np.array([2, 5, 10]), np.array([0, 5])])


def model(table: dict[bytes, np.ndarray]):
    return lambda ids, positions: table[ids.tobytes()][positions]


def by_hand(one: dict[bytes, np.ndarray], other: dict[bytes, np.ndarray]) -> tuple[list[float], float]:
    """KL at each position, and the other's perplexity, in float64."""
    kls, nll = [], []
    for ids, positions in zip(ROWS.ids, ROWS.positions, strict=True):
        for at in positions:
            p, q = (table[ids.tobytes()][at].astype(np.float64) for table in (one, other))
            p, q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
            kls.append(float((np.exp(p) * (p - q)).sum()))
            nll.append(-q[ids[at + 1]])
    return kls, float(np.exp(np.mean(nll)))


def test_a_divergence_is_that_of_float64() -> None:
    one, other = logits(1), logits(2)
    kls, perplexity = by_hand(one, other)
    found = Reference(ROWS, model(one)).divergence(model(other))
    assert found.mean_kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.p99_kl == pytest.approx(np.percentile(kls, 99), rel=1e-3)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.positions == 5
    largest = max(
        float(np.abs(one[i.tobytes()][p] - other[i.tobytes()][p]).max())
        for i, p in zip(ROWS.ids, ROWS.positions, strict=True)
    )
    assert found.max_logit == pytest.approx(largest)


def test_what_is_kept_rounds_a_divergence_by_little() -> None:
    one = logits(1)
    near = {key: value + np.float32(1e-3) * logits(3)[key] for key, value in one.items()}
    found, same = (Reference(ROWS, model(one)).divergence(model(other)) for other in (near, one))
    assert same.mean_kl < 3e-6
    assert same.max_logit == 0
    assert same.same_top == 1
    assert found.mean_kl == pytest.approx(np.mean(by_hand(one, near)[0]), abs=3e-6)


def test_the_longer_of_two_vocabularies_is_cut() -> None:
    one = logits(1)
    padded = {key: np.pad(value, ((0, 0), (0, 20)), constant_values=-1e9) for key, value in one.items()}
    for first, second in ((one, padded), (padded, one)):
        assert Reference(ROWS, model(first)).divergence(model(second)).mean_kl < 3e-6


def row(tokens: int, labels: int) -> Encoded:
    mask = np.arange(tokens) >= tokens - labels
    return Encoded(np.arange(tokens, dtype=np.int32), mask, "x:1")


def test_positions_are_those_before_a_label() -> None:
    rows = choose_positions([row(10, 3), row(6, 1)], VOCABULARY)
    assert [positions.tolist() for positions in rows.positions] == [[6, 7, 8], [4]]


def test_no_more_is_looked_at_than_can_be_kept() -> None:
    rows = choose_positions([row(400, 300)] * 50, 262_144)
    assert len(rows.ids) == 32
    assert 300 < rows.count <= KEPT_BYTES // (2 * 262_144)
    first = rows.positions[0]
    assert (first[0], first[-1]) == (99, 398), "spread over the whole answer"


def link(kl: float) -> Divergence:
    return Divergence(kl, kl, 1.0, 1.0, 1.0, 0.0, 100)


@pytest.mark.parametrize(
    ("tune", "fused", "expected"),
    [
        (1.0, 1e-4, "sound"),
        (1.0, 0.03, "broken"),  # however large the tune
        (0.05, 0.006, "broken"),
        (0.05, 0.004, "sound"),
        (0.01, 0.009, "broken"),
        (0.001, 0.0009, "sound with remarks"),  # cannot be told from rounding
    ],
)
def test_how_far_the_fused_may_be(tune: float, fused: float, expected: str) -> None:
    assert verdict(list(judge_fused({"base": link(tune), "fused": link(fused)}))) == expected


@pytest.mark.parametrize(
    ("tune", "quant", "state"),
    [(4.0, 0.3, "ok"), (4.0, 0.5, "note"), (4.0, 2.1, "broken"), (0.1, 0.2, "note"), (0.0, 0.2, "note")],
)
def test_what_a_quant_may_take_of_the_tune(tune: float, quant: float, state: str) -> None:
    (check,) = judge_quants(["BF16", "Q4_K_M-imatrix"], {"base": link(tune), "Q4_K_M-imatrix": link(quant)})
    assert check.state == state
    assert ("try --quant Q5_K_M" in check.text) == (state != "ok")


def test_the_next_better_type() -> None:
    assert [better_quant(quant) for quant in ("IQ4_XS", "IQ2_M", "IQ1_S", "F32")] == [
        "Q5_K_M",
        "Q3_K_M",
        "Q2_K",
        "BF16",
    ]
    assert [better_quant(quant) for quant in ("Q2_K", "Q4_0", "Q4_K_M", "Q5_K_S", "Q8_0", "F16")] == [
        "Q3_K_M",
        "Q5_K_M",
        "Q5_K_M",
        "Q6_K",
        "BF16",
        "BF16",
    ]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("broken", [link(NAN), link(INF), replace(link(1e-4), perplexity=NAN)])
def test_what_is_not_finite_is_broken(broken: Divergence) -> None:
    links = {"base": link(0.5), "fused": broken, "BF16": broken, "Q4_K_M": broken}
    checks = [*judge_fused(links), *judge_quants(["Q4_K_M"], links)]
    assert [(check.name, check.state) for check in checks] == [
        ("fused", "broken"),
        ("bf16 GGUF", "broken"),
        ("Q4_K_M", "broken"),
    ]
    assert verdict(checks) == "broken"


def test_a_tune_that_is_not_finite_breaks_all_that_is_measured_by_it() -> None:
    links = {"base": link(NAN), "fused": link(1e-5), "BF16": link(1e-5), "Q4_K_M": link(1e-5)}
    assert {check.state for check in [*judge_fused(links), *judge_quants(["Q4_K_M"], links)]} == {"broken"}


def test_a_model_whose_logits_are_nan_is_seen_to_be_broken() -> None:
    reference = Reference(ROWS, lambda ids, at: np.ones((len(at), VOCABULARY), np.float32))
    found = reference.divergence(lambda ids, at: np.full((len(at), VOCABULARY), np.nan, np.float32))
    assert {check.state for check in judge_fused({"base": link(0.5), "fused": found})} == {"broken"}

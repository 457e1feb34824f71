"""With which precision, and where, a finished run is verified."""

from types import SimpleNamespace
from typing import Any

import pytest

from common.verify.verify import _exact
from tests.unit.bigram import plan, recipe

COUNT = 10**9


@pytest.mark.parametrize(
    ("sharded", "precision", "free", "expected"),
    [
        (True, "bf16", {"cuda:1": 5e9, "cpu": 5e9}, ("fp32", "cuda:1")),
        (True, "bf16", {"cuda:1": 3e9, "cpu": 5e9}, ("bf16", "cuda:1")),
        (True, "bf16", {"cuda:1": 2e9, "cpu": 5e9}, ("fp32", "cpu")),
        (True, "bf16", {"cuda:1": 2e9, "cpu": 3e9}, ("bf16", "cpu")),
        (True, "fp32", {"cuda:1": 3e9, "cpu": 5e9}, ("fp32", "cpu")),
        (False, "bf16", {"cuda:1": 2e9, "cpu": 5e9}, ("bf16", "cuda:1")),  # it was trained there
    ],
)
def test_a_model_that_was_sharded_is_verified_where_it_fits(
    sharded: bool, precision: str, free: dict[str, float], expected: tuple[str, str]
) -> None:
    trained = plan(device="cuda", device_index=1, ranks=2, sharded=sharded)
    given: Any = SimpleNamespace(
        plan=trained.model_copy(update={"sharded": False}),
        recipe=recipe().model_copy(update={"precision": precision}),
        run=SimpleNamespace(plan=trained),
        base=SimpleNamespace(parameter_count=COUNT),
        adapter=SimpleNamespace(dora=False),
        over_quantized=False,
    )
    package: Any = SimpleNamespace(free_memory=lambda device: (free[device], ""))
    chosen, where = _exact(given, lambda name: package)
    assert (chosen.precision, where.device_name) == expected

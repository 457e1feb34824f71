"""Plans are what their fields allow, wherever they come from."""

import pytest
from pydantic import ValidationError

from common.recipe import Plan

PLAN = Plan(backend="torch", device="cpu", micro_batch_tokens=7, save_every=10, loss_chunk=64)


def test_a_plan_on_another_device_is_the_same_plan() -> None:
    assert PLAN.on("cuda:1") == PLAN.model_copy(update={"device": "cuda", "device_index": 1})
    assert PLAN.on("cuda:1").on("cpu") == PLAN


def test_a_plan_on_no_known_device_is_refused() -> None:
    with pytest.raises(ValidationError, match="device"):
        PLAN.on("tpu")

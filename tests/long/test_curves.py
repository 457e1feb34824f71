"""Twenty steps of real models on both backends, as two threads compute them: their rounding, and that they learn."""

import numpy as np
import pytest

from tests.parity.test_parity import GEMMA, SMOLLM2, compare_steps


@pytest.mark.parametrize(("name", "steps", "falls_to"), [(SMOLLM2, 20, 0.8), (GEMMA, 8, 1.0)])
def test_steps_of_a_real_model_agree(name: str, steps: int, falls_to: float) -> None:
    losses = compare_steps(name, steps)
    assert np.mean(losses[-4:]) < falls_to * np.mean(losses[:4])

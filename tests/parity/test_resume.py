"""A run that moves: a checkpoint written by one backend continues in the other."""

import json

import numpy as np
import pytest

from common.training import checkpoint
from common.training.checkpoint import State
from common.training.loop import Interrupted, TrainingLoop
from tests import backends
from tests.tiny import write_rows

STEPS, MOVED_AT = 24, 10


@pytest.fixture(scope="module")
def rows(tiny_llama, tmp_path_factory):
    return backends.encode_rows(tiny_llama, write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"))


def go(name, folder, recipe, rows, run, stop_at=0):
    """One process's part of a run, as `train` and `train --resume` do it; the step losses of the whole run."""
    run.mkdir(exist_ok=True)
    backend = backends.load(name, folder, recipe)
    found = checkpoint.latest(run)
    if found:
        backend.set_adapter(found[1])
        backend.set_optimizer(found[2])
    state = found[0] if found else State(micro_batch_tokens=300)
    try:
        watch = backends.Quiet(stop_at)
        TrainingLoop(backend, recipe, backends.make_plan(name), rows[4:], rows[:4], run, state, watch).train()
    except Interrupted:
        pass
    backend.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("changes", [{}, {"method": "dora"}, {"method": "full", "learning_rate": 1e-3}], ids=str)
@pytest.mark.parametrize(("first", "second"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_moves_to_the_other_backend(tiny_llama, rows, tmp_path, first, second, changes):
    recipe = backends.make_recipe(tiny_llama, **({"steps": STEPS, "learning_rate": 5e-3} | changes))
    uninterrupted = go(first, tiny_llama, recipe, rows, tmp_path / "uninterrupted")
    assert len(go(first, tiny_llama, recipe, rows, tmp_path / "moved", MOVED_AT)) == MOVED_AT
    moved = go(second, tiny_llama, recipe, rows, tmp_path / "moved")
    assert len(moved) == len(uninterrupted) == STEPS
    assert moved[:MOVED_AT] == uninterrupted[:MOVED_AT]
    assert moved[MOVED_AT:] != uninterrupted[MOVED_AT:], "it did not move"
    np.testing.assert_allclose(moved, uninterrupted, atol=1e-3)
    assert uninterrupted[-1] < uninterrupted[0]

"""The two backends side by side in float32, from one adapter start."""

import numpy as np

from common import models
from common.config import ROOT
from tests import backends
from tests.tiny import write_model, write_rows

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def both(folder, rows, recipe, steps):
    """For each backend: logits before training, step losses, final matrices."""
    results = []
    for name in ("torch", "mlx"):
        backend = backends.load(name, folder, recipe)
        logits = backend.logits(rows[0].ids)
        losses = backends.run_steps(backend, recipe, rows, steps)
        results.append((logits, losses, backends.matrices(backend)))
        backend.close()
    return results


def test_an_optimizer_state_of_one_backend_goes_on_in_the_other(tmp_path):
    folder = write_model(tmp_path / "model")
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    recipe = backends.make_recipe(folder)
    for first, second in (("torch", "mlx"), ("mlx", "torch")):
        one = backends.load(first, folder, recipe)
        backends.run_steps(one, recipe, rows, 3)
        state, adapter = one.get_optimizer(), one.get_adapter()
        expected = backends.run_steps(one, recipe, rows, 3)
        one.close()
        other = backends.load(second, folder, recipe)
        other.set_adapter(adapter)
        other.set_optimizer(state)
        np.testing.assert_allclose(backends.run_steps(other, recipe, rows, 3), expected, rtol=1e-4)
        other.close()


def test_ten_steps_of_smollm2_agree():
    folder = models.resolve(SMOLLM2, print)
    rows = backends.encode_rows(folder, ROOT / "examples" / "data" / "train.jsonl")
    recipe = backends.make_recipe(folder, rank=8, alpha=16.0, learning_rate=5e-4)
    torch, mlx = both(folder, rows, recipe, steps=10)
    print("step losses, torch and mlx:", *zip(torch[1], mlx[1], strict=True), sep="\n")
    np.testing.assert_allclose(mlx[1], torch[1], atol=1e-3)
    assert torch[1][-1] < torch[1][0]

"""Qwen3.5 and LFM2 on both backends against transformers alone, row by row: losses and gradients of every weight."""

from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.backend import weight_sum
from common.data.batching import make_batch
from tests import backends
from tests.tiny import write_family, write_rows

WIDE = (".A_log", ".dt_bias", "linear_attn.norm.weight")  # what a checkpoint keeps in float32


@pytest.fixture(scope="module", params=product(["qwen3_5_text", "lfm2"], ["float32", "bfloat16"]), ids=" ".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; in bfloat16 all but what is wide."""
    family, dtype = request.param
    folder = write_family(tmp_path_factory.mktemp(family) / "model", family)
    path = folder / "model.safetensors"
    if dtype == "bfloat16":
        stored = {
            name: tensor if name.endswith(WIDE) else tensor.astype(ml_dtypes.bfloat16)
            for name, tensor in load_file(path).items()
        }
        save_file(stored, path, metadata={"format": "pt"})
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    return folder


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_rows_in_one_batch_have_the_losses_and_gradients_that_transformers_gives_each(name, folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl", count=5, longest=60))
    batch = make_batch(rows)
    weight = weight_sum([batch])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # the end of a turn, which is a label, serves as pad too
    losses = []
    for row in range(len(rows)):
        length = batch.lengths[row]
        ids, targets = (
            torch.tensor(part[row, :length], dtype=torch.int64) for part in (batch.input_ids, batch.targets)
        )
        logits = model(ids[None], use_cache=False).logits[0]
        apart = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses.append((apart * torch.tensor(batch.loss_weights[row, :length])).sum())
    total = torch.stack(losses).sum()
    (total / weight).backward()
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    backend = backends.load(name, folder, backends.make_recipe(folder, method="full"))
    backend.accumulate([batch], weight, 1)
    assert backend.accumulated_loss() == pytest.approx(float(total.detach()), rel=1e-5)
    found = backend.gradients()
    backend.close()
    assert found.keys() == expected.keys()
    for weight, gradient in found.items():
        assert np.abs(gradient - expected[weight]).max() < 1e-4 * max(np.abs(expected[weight]).max(), 1e-3), weight

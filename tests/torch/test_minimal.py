"""`examples/minimal.py`, the Python interface: it runs, reads in one sitting, and needs nothing of the command line."""

import ast
import json

import numpy as np
import pytest

from common.commands.train import run_training
from common.display import Display
from common.models.adapter_files import read_mlx, read_peft
from common.options import Options
from examples import minimal
from tests import ROOT
from tests.contexts import context
from tests.tiny import write_rows

pytestmark = pytest.mark.slow

SOURCE = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")


@pytest.fixture
def options(tiny_llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    return Options(model=str(tiny_llama), data=str(rows), steps=6, batch_size=4, rank=4, learning_rate=1e-2)


def test_it_trains_what_the_command_line_trains(options, tmp_path):
    minimal.fine_tune(options, tmp_path / "out", Display("quiet"))
    given = {"output": str(tmp_path / "run"), "backend": "torch", "device": "cpu", "precision": "fp32"}
    run = run_training(options.model_copy(update=given | {"export": "fused"}), context())
    ours, theirs = read_peft(tmp_path / "out" / "adapter"), read_peft(run / "adapter")
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        assert np.abs(weight.B).max() > 0
        np.testing.assert_allclose(ours.weights[name].B, weight.B, atol=1e-6)
        np.testing.assert_array_equal(read_mlx(tmp_path / "out" / "adapter-mlx").weights[name].B, ours.weights[name].B)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (tmp_path / "out" / "fused").iterdir()} >= {"model.safetensors", "config.json"}


def test_it_is_short_and_uses_public_names_only():
    assert len(SOURCE.splitlines()) <= 60
    imports = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)]
    names = [name for node in imports for name in (*str(node.module).split("."), *(a.name for a in node.names))]
    assert not [name for name in names if name.startswith("_")]
    assert not [node.module for node in imports if str(node.module).startswith("common.commands")]
    attributes = [node.attr for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Attribute)]
    assert not [name for name in attributes if name.startswith("_")]

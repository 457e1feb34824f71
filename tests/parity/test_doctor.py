"""`doctor --parity`: two backends side by side, or one against the record that is kept with the project."""

from types import SimpleNamespace

import numpy as np
import pytest

import mlx_backend
import torch_backend
from common.backend_package import Choice
from common.errors import UserError
from common.verify import parity
from common.verify.tiny_models import TINY, write_tiny
from tests.contexts import context


def found(capsys):
    """The table's rows on standard output as words: what, found, bound, within."""
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return {" ".join(line[:-3]): line[-3:] for line in lines}


def alone(monkeypatch, *names):
    """As on a machine that has the named backends only."""
    for name, package in {"torch": torch_backend, "mlx": mlx_backend}.items():
        if name not in names:
            monkeypatch.setattr(package, "fault", lambda: UserError("It is not installed.", ""))


def test_two_backends_side_by_side(capsys):
    assert parity.parity("llama", context("plain"))
    table = found(capsys)
    assert table.keys() == {"logits", "step losses", "adapters"}
    assert [row[2] for row in table.values()] == ["yes"] * 3
    assert all(0 < float(row[0]) < float(row[1]) for row in table.values())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_each_backend_alone_meets_the_record(backend, family, capsys, monkeypatch):
    alone(monkeypatch, backend)
    assert parity.parity(family, context("plain"))
    table = found(capsys)
    assert table.keys() == {"logits", "step losses"}
    assert [row[2] for row in table.values()] == ["yes"] * 2


def test_a_backend_that_computes_otherwise_is_told(capsys, monkeypatch):
    alone(monkeypatch, "torch")
    right = parity.recorded("llama")
    wrong = parity.Result(right.logits, right.losses * (1 + 2e-4 * np.arange(len(right.losses))), {})
    monkeypatch.setattr(parity, "recorded", lambda family: wrong)
    assert not parity.parity("llama", context("plain"))
    table = found(capsys)
    assert (table["logits"][2], table["step losses"][2]) == ("yes", "NO")


def test_a_named_gpu_is_computed_on(monkeypatch, tmp_path):
    """As of several NVIDIA GPUs the freest one is chosen."""
    loaded = []
    backend = SimpleNamespace(load=lambda recipe, plan, *rest: loaded.append(plan), close=lambda: None)
    here = context(create=lambda: backend)
    monkeypatch.setattr(torch_backend, "choose_device", lambda wanted: Choice("cuda:1", "the freest"))
    with parity.loaded("torch", here.backends, write_tiny(tmp_path, "llama"), ["all-linear"]):
        pass
    assert [plan.device_name for plan in loaded] == ["cuda:1"]


def test_without_a_backend_nothing_is_checked(monkeypatch):
    alone(monkeypatch)
    with pytest.raises(UserError, match="Neither backend"):
        parity.parity("llama", context("plain"))

"""Generation with a cache of keys and values, for every family, windows and the longrope split passed on the way."""

import pytest

from tests import backends
from tests.backends import METHODS
from tests.tiny import FAMILIES, write_family, write_model, write_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_whole_row(family, tmp_path):
    folder = write_family(tmp_path / "model", family)
    backends.check_generation("mlx", folder, backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize("changes", [METHODS["dora"], {"dropout": 0.2}], ids=["dora", "dropout"])
def test_other_adapters_generate_too(changes, tmp_path):
    folder = write_model(tmp_path / "model")
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    backends.check_generation("mlx", folder, rows, **changes)

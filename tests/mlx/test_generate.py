"""Generation with a cache of keys and values. The families are in tests/parity."""

import pytest

from tests import backends
from tests.backends import METHODS
from tests.tiny import write_model, write_rows

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("changes", [{}, METHODS["dora"], {"dropout": 0.2}], ids=["lora", "dora", "dropout"])
def test_greedy_tokens_are_those_of_the_whole_row(changes, tmp_path):
    folder = write_model(tmp_path / "model")
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    backends.check_generation("mlx", folder, rows, **changes)

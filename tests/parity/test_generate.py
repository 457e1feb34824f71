"""Generation with a cache of keys and values, for every family, windows and the longrope split passed on the way."""

from pathlib import Path

import pytest

from tests import backends
from tests.tiny import FAMILIES, write_family, write_rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_greedy_tokens_are_those_of_the_whole_row(backend: str, family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", family)
    rows = backends.encode_rows(folder, write_rows(tmp_path / "rows.jsonl"))
    # a gated delta net norms each head's output, however small it is; logits are up to 6
    backends.check_generation(backend, folder, rows, atol=1e-4 if family.startswith("qwen3_5") else 2e-5)

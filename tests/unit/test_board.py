"""docs/board.md holds what lies in the repository."""

import json
from pathlib import Path

from benchmarks import verified
from benchmarks.board import PAGE, board
from common.verify.parity import BOUNDS, MEASURED
from common.verify.tiny_models import TINY


def test_the_board_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == board(), "write it again: python -m benchmarks.board"


def test_the_parity_that_is_on_record_is_within_bounds() -> None:
    known = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert set(known) <= set(TINY)
    for family, one in known.items():
        assert all(one["differences"][what] < bound for what, bound in BOUNDS.items()), family
        assert not one["commit"].endswith("-dirty"), family


def test_a_record_replaces_that_of_its_family_and_backend(tmp_path: Path) -> None:
    path = tmp_path / "verified.json"
    path.write_text('[{"family": "llama", "backend": "torch", "verdict": "old"}, {"family": "phi3", "backend": "mlx"}]')
    found = {"family": "llama", "backend": "torch", "verdict": "sound"}
    checks = {"stop": "ok: ends itself", "Q8_0": "ok: KL 7.6e-05 from the bf16 GGUF, 0.0% of the tune's own 2.1"}
    verified.record([found | {"checks": checks}], path)
    first, second = json.loads(path.read_text())
    assert (first["verdict"], first["checks"]["Q8_0"], first["checks"]["stop"]) == ("sound", "7.6e-05", "ok")
    assert {"date", "commit", "llama.cpp"} <= first.keys()
    assert second["family"] == "phi3"

"""The short form of `python -m tests.faults.fuzz`: a few cases of every reader, the same each time."""

import re
from pathlib import Path

import pytest

from common.data import load
from tests.faults import fuzz
from tests.faults.fuzz import READERS

CASES = {name: max(12, share // 4) for name, (share, _) in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    found = fuzz.fuzz(name, CASES[name], 1, tmp_path)
    assert found.other == {}
    assert found.cases == CASES[name] == found.accepted + found.refused


def test_what_is_no_user_error_is_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*anything: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(load, "_examples", broken)
    found = fuzz.fuzz("rows", 60, 1, tmp_path)
    ((kind, (count, where)),) = found.other.items()
    assert re.fullmatch(r"KeyError at common/data/load.py:\d+", kind)
    assert count == 60 - found.accepted - found.refused
    assert "KeyError: 'x'" in (Path(where) / "traceback.txt").read_text()
    assert f"{count:,}" in fuzz.table({"rows": found})

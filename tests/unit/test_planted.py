"""Each fault that `make test-long` plants has a place to be planted in."""

import pytest

from tests import ROOT
from tests.long.test_planted_faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_the_right_text_stands_there_once(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right) == 1

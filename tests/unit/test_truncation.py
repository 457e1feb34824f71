"""Long rows: dropped, cut without an end, or refused."""

import numpy as np
import pytest

from common.data.encode import Encoded, stop_ids
from common.data.truncation import filter_by_length
from common.errors import UserError


def row(length: int, labels: int, source: str = "a:1") -> Encoded:
    """`labels` label tokens at the end, the last of them the stop 9."""
    ids = np.arange(length, dtype=np.int32)
    ids[-1] = 9
    return Encoded(ids, np.arange(length) >= length - labels, source, (9,))


ROWS = [row(5, 3), row(8, 4, "a:2"), row(12, 2, "a:3")]


def test_long_rows_are_dropped() -> None:
    fitted = filter_by_length(ROWS, 6, "drop")
    assert ([r.source for r in fitted.rows], [r.source for r in fitted.dropped]) == (["a:1"], ["a:2", "a:3"])
    assert fitted.truncated == []


def test_a_cut_row_keeps_its_beginning_and_gets_no_end() -> None:
    fitted = filter_by_length(ROWS, 6, "truncate")
    assert [r.source for r in fitted.rows] == ["a:1", "a:2"]
    cut = fitted.rows[1]
    assert cut.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert cut.mask.tolist() == [False] * 4 + [True] * 2
    assert 9 not in cut.ids
    assert [r.source for r in fitted.dropped] == ["a:3"]  # nothing of its answer was left
    assert [len(r.ids) for r in fitted.truncated] == [8]


def test_the_stop_is_known_from_the_whole_rows() -> None:
    assert stop_ids([ROWS[1]]) == [9]


def test_long_rows_are_refused_by_name() -> None:
    with pytest.raises(UserError) as caught:
        filter_by_length(ROWS, 6, "error")
    assert caught.value.what == ("--overflow error: 2 rows have more than --max-length 6 tokens: a:2 (8), a:3 (12).")
    assert len(filter_by_length(ROWS, 12, "error").rows) == 3


def test_rows_in_which_nothing_is_trained_are_apart() -> None:
    fitted = filter_by_length([*ROWS, row(4, 0, "a:4")], 6, "drop")
    assert ([r.source for r in fitted.rows], [r.source for r in fitted.unlabeled]) == (["a:1"], ["a:4"])

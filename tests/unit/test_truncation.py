"""Long rows: dropped, cut without an end, or refused."""

from collections.abc import Sequence

import numpy as np
import pytest

from common.data.dataset import Example
from common.data.encode import Encoded, Encoder
from common.data.encode_rows import encode_parts
from common.data.encoded_rows import EncodedRows, stop_ids
from common.data.truncation import filter_by_length
from common.data.turn_edges import BadRow
from common.errors import UserError


def row(length: int, labels: int, source: str = "a:1") -> Encoded:
    """`labels` label tokens at the end, the last of them the stop 9."""
    ids = np.arange(length, dtype=np.int32)
    ids[-1] = 9
    return Encoded(ids, np.arange(length) >= length - labels, source, (9,))


ROWS = [row(5, 3), row(8, 4, "a:2"), row(12, 2, "a:3")]


def numbered(count: int) -> list[Example]:
    return [Example((), f"a:{number}", text=str(number)) for number in range(1, count + 1)]


class EvenOnly(Encoder):
    """Cannot label rows of odd numbers."""

    def __init__(self) -> None:
        self.calls = 0

    def encode_batch(self, examples: Sequence[Example]) -> list[Encoded | BadRow]:
        self.calls += 1
        odd = [int(example.text or 0) % 2 == 1 for example in examples]
        return [
            BadRow(example.source, "is odd.", "Remove the row.") if is_odd else row(5, 3, example.source)
            for example, is_odd in zip(examples, odd, strict=True)
        ]


def test_rows_that_cannot_be_labeled_are_refused_together() -> None:
    with pytest.raises(UserError) as caught:
        encode_parts([numbered(5)], EvenOnly(), "error")
    assert caught.value.what == "3 rows cannot be trained on:\na:1: is odd.\na:3: is odd.\na:5: is odd."
    assert caught.value.fix == "Remove the row. Or leave such rows out: --on-bad-row drop."
    with pytest.raises(UserError) as caught:
        encode_parts([numbered(1)], EvenOnly(), "error")
    assert caught.value.what == "a:1: is odd."
    even = EvenOnly()
    with pytest.raises(UserError, match="10 rows cannot be trained on, and maybe more:\na:1: is odd"):
        encode_parts([numbered(5), numbered(5000)], even, "error")
    assert even.calls == 2


def test_rows_that_cannot_be_labeled_are_dropped() -> None:
    shares = []
    parts, bad = encode_parts(
        [numbered(5), [], numbered(2)], EvenOnly(), "drop", lambda share, text: shares.append(share)
    )
    assert [[row.source for row in part] for part in parts] == [["a:2", "a:4"], [], ["a:2"]]
    assert [(row.source, row.reason) for row in bad.first] == [(f"a:{n}", "is odd.") for n in (1, 3, 5, 1)]
    assert shares == [0, 5 / 7]


def test_long_rows_are_dropped() -> None:
    fitted = filter_by_length(ROWS, 6, "drop")
    assert ([r.source for r in fitted.rows], [r.source for r in fitted.dropped]) == (["a:1"], ["a:2", "a:3"])
    assert len(fitted.truncated) == 0


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
    assert stop_ids(EncodedRows.of([ROWS[1]])) == [9]


def test_long_rows_are_refused_by_name() -> None:
    with pytest.raises(UserError) as caught:
        filter_by_length(ROWS, 6, "error")
    assert caught.value.what == ("--overflow error: 2 rows have more than --max-length 6 tokens: a:2 (8), a:3 (12).")
    assert len(filter_by_length(ROWS, 12, "error").rows) == 3


def test_rows_in_which_nothing_is_trained_are_apart() -> None:
    fitted = filter_by_length([*ROWS, row(4, 0, "a:4")], 6, "drop")
    assert ([r.source for r in fitted.rows], [r.source for r in fitted.unlabeled]) == (["a:1"], ["a:4"])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 29, 30])
def test_each_label_of_a_text_is_one_of_a_block(bos: bool, length: int) -> None:
    ids = np.arange(100, 130, dtype=np.int32)
    text = Encoded(ids, np.arange(30) > 0 if bos else np.ones(30, bool), "a.txt:1", (129,), text=True)
    chat = row(40, 3, "a.jsonl:2")
    fitted = filter_by_length([text, chat], length, "split")
    assert [long.source for long in fitted.dropped] == ["a.jsonl:2"]
    if length == 30:
        assert [kept.ids.tolist() for kept in fitted.rows] == [ids.tolist()]
        return
    assert [long.ids.tolist() for long in fitted.split] == [ids.tolist()]
    assert all(2 <= len(block.ids) <= length and block.source == "a.txt:1" for block in fitted.rows)
    learned = [int(i) for block in fitted.rows for i in block.ids[1:][block.mask[1:]]]
    assert learned == ids[1:].tolist()
    if bos:
        assert all(block.ids[0] == 100 and not block.mask[0] for block in fitted.rows)
    assert len(fitted.every) == 2

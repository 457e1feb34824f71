"""A JSON list read in pieces gives what reading it as a whole does."""

import io
import json

import pytest

from common.data import json_list
from common.data.json_list import JsonList, NotJson

LISTS = [
    "[]",
    " [ ] \n",
    "[1, 2.5e3,-0, 12345678901234567890]",
    '[{"a": [1, {"b": "x, ]"}]}, "ünicode \\u00e9 \\\\ \\"", null,true , false]\n\n',
    json.dumps([{"messages": [{"role": "user", "content": "q" * n}]} for n in range(40)], indent=1),
]


def elements(text: str) -> list[object]:
    return list(JsonList(io.StringIO(text)).elements())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("text", LISTS)
def test_every_cut_gives_the_same_elements(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_READ", size)
    assert elements(text) == json.loads(text)


@pytest.mark.parametrize("size", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "text", ["", "{}", "[", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1] x", '["a', "[nope]", "[" * 5000]
)
def test_what_is_no_list_is_an_error(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_READ", size)
    with pytest.raises(NotJson):
        elements(text)


def test_little_of_the_text_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_READ", 1000)
    reader = JsonList(io.StringIO(json.dumps(["x" * 90] * 5000)))
    assert max(len(reader._held) for _ in reader.elements()) < 3000

"""What may be shown of other libraries' errors."""

import sys
from types import SimpleNamespace

import pytest

from common.data.load import load_data
from common.errors import UserError, first_line, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://me:pw@host/x?a=b@c failed", "GET https://***@host/x?a=b@c failed"),
        ("URL('https://me:p@w@host')", "URL('https://***@host')"),
        ("proxy http://token@proxy:3128", "proxy http://***@proxy:3128"),
        ("https://host/@me and me@host", "https://host/@me and me@host"),
    ],
)
def test_urls_lose_their_user_and_password(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_the_hubs_token_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(get_token=lambda: "hf_secret"))
    assert first_line(ValueError("Bearer hf_secret\nand more")) == "Bearer ***"
    assert first_line(ValueError()) == "ValueError"


def test_a_data_set_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **settings: object) -> None:
        raise ConnectionError("HEAD https://me:hush@mirror/api/datasets/a/b: refused")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot be loaded: HEAD https://\*\*\*@mirror") as caught:
        load_data("a/b", 0.1, 0)
    assert "hush" not in str(caught.value)

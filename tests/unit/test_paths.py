"""Paths that no file can have are refused wherever a user or a stranger's file gives one."""

from pathlib import Path

import pytest

from common.commands.chat import ChatSession
from common.data.encode import load_tokenizer
from common.data.load import load_data
from common.display import Display
from common.errors import UserError
from common.inference.prompts import system_text
from common.llama_cpp.install import find
from common.models.resolve import resolve
from common.option_sources import load_options
from common.paths import path_fault, user_path
from common.sampling import Sampling

NOBODY = "~nosuchuser/x.jsonl"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (NOBODY, "there is no user 'nosuchuser'"),
        ("a\0b", "it holds a zero byte"),
        ("\ud800", "it holds half a letter"),
        ("a/" + "x" * 256, "it is too long"),
        ("/".join(["x" * 99] * 50), "it is too long"),
        ("~/rows.jsonl", ""),
        ("owner/name:config@revision#train", ""),
        ("", ""),
    ],
)
def test_why_no_file_can_be_there(text: str, fault: str) -> None:
    assert path_fault(text) == fault


def test_a_home_folder_is_found() -> None:
    assert user_path("~/a", "--data") == Path.home() / "a"


@pytest.mark.parametrize("name", ["model", "data", "adapter", "chat_template", "llama_cpp", "output", "resume"])
def test_every_option_that_is_a_path(name: str) -> None:
    given = {"model": "tiny", "data": "rows.jsonl"} | {name: NOBODY}
    with pytest.raises(UserError) as caught:
        load_options(given)
    assert f"--{name.replace('_', '-')}: is not a path: there is no user 'nosuchuser'" in caught.value.what


def test_a_path_in_yaml_is_a_fault_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"data: {NOBODY}\nrank: 0\n")
    with pytest.raises(UserError) as caught:
        load_options({"config": str(tmp_path / "a.yaml")})
    assert "data: is not a path: there is no user" in caught.value.what
    assert "rank: Input should be" in caught.value.what


def test_everything_else_that_takes_a_path(tokenizer_folder: Path) -> None:
    session = ChatSession(None, Sampling(), Display("quiet"))  # type: ignore[arg-type]
    for attempt in (
        lambda: load_options({"config": NOBODY}),
        lambda: load_data(NOBODY, 0.1, 0),
        lambda: resolve(NOBODY, print),
        lambda: find(NOBODY),
        lambda: load_tokenizer(tokenizer_folder, NOBODY),
        lambda: system_text(f"@{NOBODY}"),
        lambda: session.load(f"{NOBODY} 1"),
        lambda: session.save(NOBODY),
    ):
        with pytest.raises(UserError, match="is not a path: there is no user 'nosuchuser'"):
            attempt()


def test_a_row_number_of_thousands_of_digits_is_no_number(tmp_path: Path) -> None:
    session = ChatSession(None, Sampling(), Display("quiet"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="/load"):
        session.load(f"{tmp_path / 'a.jsonl'} {'9' * 5_000}")

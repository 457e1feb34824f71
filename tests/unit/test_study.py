"""The file of a search: wherever its folder is, and whatever the disk refuses."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from common.errors import UserError
from common.evaluation.study import Study

SPACE: Any = SimpleNamespace(
    options=SimpleNamespace(seed=0), automatic={"rank": 16}, written=None, rates=None, choices={"rank": [8, 16]}
)
LATIN = pytest.param(os.fsdecode(b"caf\xe9"), marks=pytest.mark.skipif(sys.platform != "linux", reason="no such name"))


@pytest.mark.parametrize("name", ["why?", "a?b=c", "a#b", "a%41b", "{x}", "答 え", LATIN])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    study = Study(folder, SPACE)
    study.tell(study.next(), {"how": "complete", "loss": 2.0})
    assert [one.loss for one in Study(folder, SPACE).ended()] == [2.0]
    assert [path.name for path in folder.iterdir()] == ["trials.sqlite3"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def small_disk() -> Iterator[dict[str, int]]:
    """The `pages` that the file may have, at a connection's beginning."""
    given = {"pages": 1}

    def limit(connection: Any, record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={given['pages']}")

    event.listen(Engine, "connect", limit)
    yield given
    event.remove(Engine, "connect", limit)


def test_a_full_disk_is_named_with_the_command_that_continues(tmp_path: Path, small_disk: dict[str, int]) -> None:
    def is_named(error: UserError) -> None:
        assert error.what == f"{tmp_path / 'trials.sqlite3'} cannot be written: database or disk is full"
        again = f"python cli.py tune --resume {tmp_path} and a --budget or --trials"
        assert error.fix == f"Free space on that disk, then continue with: {again}"

    with pytest.raises(UserError) as caught:
        Study(tmp_path, SPACE)
    is_named(caught.value)
    small_disk["pages"] = 100
    study = Study(tmp_path, SPACE)
    trial = study.next()
    for write in (trial.keep, lambda kept: study.keep_repetition(1, 1, kept)):
        with pytest.raises(UserError) as caught:
            write({"loss": 2.0, "much": "x" * 1_000_000})
        is_named(caught.value)
    study.tell(trial, {"how": "complete", "loss": 2.0})  # there is space again
    assert [one.loss for one in Study(tmp_path, SPACE).ended()] == [2.0]

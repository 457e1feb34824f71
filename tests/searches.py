"""Searches on a backend without a framework, for tests of `tune`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import cli
from common import files
from common.commands import tune as module
from common.commands.arguments import joined
from common.errors import UserError
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram

QUICK = ("--epochs", 4, "--batch-size", 4)  # twelve steps a trial


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To wait for the disk would take most of the time."""
    monkeypatch.setattr(files, "_sync", lambda path: None)

    def hurry(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture
def words(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> list[str]:
    """A search on 12 training and 12 validation rows."""
    monkeypatch.chdir(tmp_path)
    given = {
        "model": tiny_llama,
        "data": write_rows(tmp_path / "rows.jsonl"),
        "output": tmp_path / "found",
        "valid-share": 0.5,
        "backend": "torch",
        "device": "cpu",
        "precision": "fp32",
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


class Backends:
    """Makes backends and counts them."""

    def __init__(self, kind: Callable[[], Bigram] = Bigram) -> None:
        self.kind, self.made = kind, 0

    def __call__(self) -> Bigram:
        self.made += 1
        return self.kind()


def run(words: list[str], *more: object, create: Callable[[], Any] | None = None) -> int:
    parser = cli.build_parser("tune")
    args, extra = parser.parse_known_args(joined(["tune", *words, *map(str, more)]))
    assert not extra
    return module.run(args, context("quiet", create or Backends()))


def fault(words: list[str], *more: object, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        run(words, *more, **settings)
    return caught.value


def without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return [*words[:at], *words[at + 2 :]]


def trials(folder: Path) -> list[dict[str, Any]]:
    """Of the study, without the time that they took."""
    import optuna

    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'trials.sqlite3'}")
    return [
        {"state": t.state.name, "params": t.params, "reported": t.intermediate_values, "value": t.value}
        | {name: value for name, value in t.user_attrs.get("outcome", {}).items() if name != "seconds"}
        for t in study.trials
    ]


def losses(folder: Path, number: int) -> list[float]:
    lines = (folder / "trials" / f"{number:03d}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line).get("loss") for line in lines]

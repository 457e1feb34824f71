"""`check-data --with-model`: what the base model already answers."""

import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from common.backend import ModelInfo
from common.commands.check_data import check_data
from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.data.encoded_rows import EncodedRows
from common.evaluation import base_answers as module
from common.options import Options
from tests.contexts import context
from tests.tiny import chat


class Knowing:
    """A model that knows the answers of some rows: of every `each`-th that it is asked."""

    def __init__(self, each: int) -> None:
        self.each, self.asked, self.closed = each, 0, False
        self.rows: list[np.ndarray] = []

    def load(self, recipe: Any, plan: Any, folder: Path, adapter: Any) -> ModelInfo:
        assert (recipe.method, adapter.rank_and_alpha[0], plan.device) == ("lora", 1, "cpu")
        return ModelInfo(1, 1, 1, "Knowing")

    def logits(self, ids: np.ndarray, adapter: bool, positions: np.ndarray) -> np.ndarray:
        assert not adapter
        row = next(row for row in self.rows if len(row) > len(ids) and (row[: len(ids)] == ids).all())
        found = np.zeros((len(positions), 300), np.float32)
        found[np.arange(len(positions)), row[1:][positions]] = 9
        if self.asked % self.each:
            found[-1] = 0
        self.asked += 1
        return found

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def rows(tiny_llama: Path, tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """A file of a hundred rows, and their ids."""
    path = tmp_path / "a.jsonl"
    given = [chat(f"What is {number} times 37?", f"It is {number * 37}.") for number in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    encoder = Encoder(load_tokenizer(tiny_llama), MaskingOptions())
    from common.data.load import read_rows

    return path, [encoder(row).ids for row in read_rows(path)]


@pytest.mark.parametrize(("each", "answered"), [(1, 64), (2, 32), (3, 22)])
def test_the_rows_that_it_answers_are_counted(
    rows: tuple[Path, list[np.ndarray]],
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    each: int,
    answered: int,
) -> None:
    backend = Knowing(each)
    path, backend.rows = rows
    given = {"data": str(path), "model": str(tiny_llama), "valid_share": 0.0, "backend": "torch", "device": "cpu"}
    where = context("json", create=lambda: backend)
    check_data(Options.model_validate(given), None, where.display, where)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [event["text"] for event in events if event["event"] == "note"]
    assert any(
        text.startswith("base model: loss 0.")
        and text.endswith(f"64 drawn rows, of which it answers {answered} word for word")
        for text in texts
    )
    known = [advice for advice in events[-1]["advice"] if advice["what"].startswith("the base model already")]
    assert bool(known) == (each < 3)
    if known:
        assert known[0]["what"] == f"the base model already answers {answered} of 64 drawn rows word for word"
        assert known[0]["to_do"] == "Train on rows that it does not know."
    assert backend.closed


def test_no_row_is_asked_after_two_minutes(
    rows: tuple[Path, list[np.ndarray]], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Knowing(1)
    path, backend.rows = rows
    clock: Iterator[int] = count(0, 50)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    encoder = Encoder(load_tokenizer(tiny_llama), MaskingOptions())
    from common.data.load import read_rows

    encoded = EncodedRows.of([encoder(row) for row in read_rows(path)])
    found = module._asked(backend, encoded, lambda share, text: None)  # type: ignore[arg-type]
    assert (found.asked, found.answered) == (2, 2)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--backend", "torch", "--device", "cpu"], "--backend and --device: no model is loaded."),
        (["--with-model", "--explain", "1"], "--with-model: --explain shows one row, and asks no model."),
    ],
)
def test_flags_without_effect(
    flags: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twintune", "check-data", "a.jsonl", *flags])
    with pytest.raises(SystemExit):
        cli.main()
    assert fault in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.slow
def test_both_backends_are_asked(
    rows: tuple[Path, list[np.ndarray]], tiny_llama: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    given = {"data": str(rows[0]), "model": str(tiny_llama), "valid_share": 0.0, "backend": backend, "device": "cpu"}
    where = context("json")
    check_data(Options.model_validate(given | {"precision": "fp32"}), None, where.display, where)
    text = next(line for line in capsys.readouterr().out.splitlines() if "base model: loss" in line)
    assert 5 < float(text.partition("loss ")[2].split()[0]) < 7  # of 259 tokens: the model is random

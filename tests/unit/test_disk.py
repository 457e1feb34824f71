"""A result waits in memory for a disk that is full."""

import errno
from pathlib import Path
from typing import Any

import pytest

from common.commands.train import run_training
from common.models import adapter_files
from common.options import Options
from common.run_record import Run
from common.system import disk
from common.system.disk import once_there_is_room
from tests.contexts import context
from tests.tiny import write_rows
from tests.unit.bigram import Bigram


class Refusing:
    """A write that the disk refuses so many times."""

    def __init__(self, times: int, number: int = errno.ENOSPC) -> None:
        self.left, self.number, self.calls = times, number, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.left:
            raise OSError(self.number, "No space left on device", "run/adapter")
        return "written"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, on a clock that only this moves."""
    slept: list[float] = []
    monkeypatch.setattr(disk.time, "sleep", slept.append)
    monkeypatch.setattr(disk.time, "monotonic", lambda: sum(slept))
    return slept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_write_is_tried_again_until_there_is_room(slept: list[float], number: int) -> None:
    warnings: list[str] = []
    assert once_there_is_room(Refusing(3, number), "The adapter", warnings.append) == "written"
    assert len(slept) == 3
    assert len(warnings) == 1, "one warning, not one each time"
    assert warnings[0].startswith("No space left on device: run/adapter. The adapter is in memory only. Free space")


def test_after_an_hour_the_fault_is_raised(slept: list[float]) -> None:
    with pytest.raises(OSError, match="No space left"):
        once_there_is_room(Refusing(10**6), "The adapter", lambda text: None)
    assert sum(slept) == 3600


def test_another_fault_is_raised_at_once(slept: list[float]) -> None:
    write = Refusing(1, errno.EIO)
    with pytest.raises(OSError, match="run/adapter"):
        once_there_is_room(write, "The adapter", lambda text: None)
    assert (write.calls, slept) == (1, [])


def test_a_run_whose_adapter_was_refused_is_complete_once_there_is_room(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(disk, "_AGAIN", 0.0)
    refusing = Refusing(2)
    write = adapter_files.write_peft

    def refused_first(*arguments: Any) -> None:
        refusing()
        write(*arguments)

    monkeypatch.setattr(adapter_files, "write_peft", refused_first)
    given = {
        **{"model": str(tiny_llama), "data": str(write_rows(tmp_path / "rows.jsonl")), "output": str(tmp_path / "run")},
        **{"backend": "torch", "device": "cpu", "precision": "fp32", "export": "none", "rank": 2, "steps": 2},
    }
    folder = run_training(Options.model_validate(given), context(create=Bigram))
    assert refusing.calls == 3
    assert Run(folder).record.status == "complete"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()

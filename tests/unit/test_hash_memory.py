"""The hash of a large model is remembered until a file of it changes."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from common.models import hash_memory, model_folder
from common.models.model_folder import ModelFolder
from tests.unit.base_folder import write_base


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that counts as large, and was written long ago."""
    monkeypatch.setattr(hash_memory, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hash_memory, "LEAST", 1)
    monkeypatch.setattr(hash_memory, "_SETTLED", -1.0)
    return write_base(tmp_path / "model")


def tensors_read(folder: Path, read: bool = False) -> int:
    steps: list[str] = []
    ModelFolder(folder).content_hash(lambda share, text: steps.append(text), read)
    return len(steps)


def test_unchanged_weights_are_read_once(folder: Path) -> None:
    """With --rehash they are read all the same."""
    found = ModelFolder(folder).content_hash()
    assert tensors_read(folder) == 0
    assert ModelFolder(folder).content_hash() == found
    assert tensors_read(folder, read=True) > 0


def test_a_changed_file_is_seen_though_size_and_time_are_the_same(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before, stat = ModelFolder(folder).content_hash(), weights.stat()
    time.sleep(0.01)  # a tick of the file system's clock
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_mtime_ns == stat.st_mtime_ns
    assert ModelFolder(folder).content_hash() != before


def test_a_hash_that_was_computed_in_another_way_is_not_believed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ModelFolder(folder).content_hash()
    (kept,) = (tmp_path / "cache" / "model-hashes").iterdir()
    kept.write_text(kept.read_text().replace(found, "0" * 64))
    assert ModelFolder(folder).content_hash() == "0" * 64
    monkeypatch.setattr(model_folder, "_HASHING", 0)
    assert ModelFolder(folder).content_hash() == found


def test_the_way_of_hashing_is_that_of_its_version(tmp_path: Path) -> None:
    """Where this hash changes, _HASHING is raised: else remembered hashes of the old kind are believed."""
    weights = {"model.norm.weight": np.arange(4, dtype=np.float32)}
    found = ModelFolder(write_base(tmp_path / "fixed", weights=weights)).content_hash()
    assert (model_folder._HASHING, found[:16]) == (1, "0f7d4b98ade56e12")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"hash": "0", "files": []}', b'{"hash": 5}'])
def test_what_is_remembered_may_be_damaged(folder: Path, tmp_path: Path, damage: bytes) -> None:
    found = ModelFolder(folder).content_hash()
    (kept,) = (tmp_path / "cache" / "model-hashes").iterdir()
    kept.write_bytes(damage)
    assert ModelFolder(folder).content_hash() == found
    assert tensors_read(folder) == 0


def test_a_small_or_a_fresh_model_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_memory, "_SETTLED", 60.0)
    assert tensors_read(folder) == tensors_read(folder) > 0
    monkeypatch.setattr(hash_memory, "_SETTLED", -1.0)
    monkeypatch.setattr(hash_memory, "LEAST", 10**9)
    assert tensors_read(folder) == tensors_read(folder) > 0


def test_a_cache_that_cannot_be_written_costs_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(ModelFolder(folder).content_hash()) == 64

"""Arrays that are read one by one, and written so."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from common.errors import UserError
from common.lazy_arrays import LazyArrays, joined, part_of, shapes_of
from common.models.safetensors_files import lazy_tensors, save_tensors


def lazy(names: str, asked: list[str]) -> LazyArrays:
    def read(name: str) -> np.ndarray:
        asked.append(name)
        return np.full((2, 3), ord(name), np.float32)

    return LazyArrays(dict.fromkeys(names, (2, 3)), read)


def test_an_array_is_read_when_it_is_asked_for() -> None:
    asked: list[str] = []
    arrays = joined({"first": lazy("ab", asked), "second": lazy("ab", asked)})
    assert shapes_of(arrays) == dict.fromkeys(["first.a", "first.b", "second.a", "second.b"], (2, 3))
    assert asked == []
    assert arrays["second.a"][0, 0] == ord("a")
    assert asked == ["a"]
    with pytest.raises(KeyError):
        lazy("ab", asked)["c"]
    assert joined({"only": {"a": np.ones(1, np.float32)}}) == {"only.a": np.ones(1, np.float32)}


@pytest.mark.parametrize("wrong", [np.zeros((3, 2), np.float32), np.zeros((2, 3))])
def test_an_array_of_another_shape_or_type_than_declared_is_not_given(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="not float32"):
        LazyArrays({"a": (2, 3)}, lambda name: wrong)["a"]


def test_lazy_arrays_are_written_one_after_another(tmp_path: Path) -> None:
    asked: list[str] = []
    save_tensors(lazy("ba", asked), tmp_path / "file.safetensors", {"step": "3"})
    assert asked == ["b", "a"]
    found = load_file(tmp_path / "file.safetensors")
    assert {name: array.dtype for name, array in found.items()} == {"a": np.float32, "b": np.float32}
    assert (found["b"] == ord("b")).all()
    with safe_open(tmp_path / "file.safetensors", "np") as file:
        assert file.metadata() == {"step": "3"}


def test_every_type_and_shape_is_read_by_the_library_as_it_was_written(tmp_path: Path) -> None:
    types = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.uint32, np.int64, np.int8, np.bool_)
    tensors = {f"{np.dtype(kind)} ü": np.arange(6).reshape(2, 3).astype(kind) for kind in types}
    tensors["swapped"] = np.arange(3, dtype=">f4")
    tensors |= {"cut": np.arange(12, dtype=np.float32).reshape(3, 4).T[1:], "empty": np.empty((0, 2), np.float32)}
    tensors |= {"scalar": np.array(7, np.float32)}
    save_tensors(tensors, tmp_path / "file.safetensors", {})
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (found[name].dtype.name, found[name].shape) == (array.dtype.name, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"'{tmp_path}'$"):
        save_tensors({}, tmp_path, {})


def test_a_file_is_read_array_by_array(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_tensors({"m.a": np.full((2, 3), 1.5, ml_dtypes.bfloat16), "m.b": np.ones(4, np.float32)}, file, {})
    arrays = lazy_tensors(file, "Repair it.")
    assert shapes_of(arrays) == {"m.a": (2, 3), "m.b": (4,)}
    part = part_of(arrays, "m")
    assert shapes_of(part) == {"a": (2, 3), "b": (4,)}
    np.testing.assert_array_equal(part["a"], np.full((2, 3), 1.5, np.float32))
    part["b"][0] = 2  # torch wants arrays that can be written to
    assert part["b"][0] == 1
    assert not part_of(arrays, "n")


def test_a_file_that_cannot_be_read_array_by_array_is_named_before(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    for content in (None, b"no safetensors"):
        if content:
            file.write_bytes(content)
        with pytest.raises(UserError, match="is damaged: it is missing, cut off, or no safetensors file"):
            lazy_tensors(file, "Repair it.")
    save_tensors({"a": np.ones(3, np.float32)}, file, {})
    arrays = lazy_tensors(file, "Repair it.")
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(UserError, match="was cut off while it was read"):
        arrays["a"]
    save_tensors({"a": np.ones(3, np.int8)}, file, {})
    with pytest.raises(UserError, match="a holds no weights"):
        lazy_tensors(file, "Repair it.")

"""Where the quantized weights behind a 16-bit view are, and whose word is taken for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.models import mlx_quantized
from common.models.mlx_quantized import _shard, quantized_source, view
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.system.cache import cache_folder
from tests.tiny import write_model


@pytest.mark.parametrize("content", [{"x": 1}, {"path": "/etc", "scheme": "mlx-4bit-64"}], ids=str)
def test_a_strangers_folder_names_no_other(tmp_path: Path, content: dict) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "quantized_source.json").write_text(json.dumps(content))
    assert quantized_source(resolve(str(folder), print).path) is None


def test_a_view_in_the_cache_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = cache_folder() / "models" / "m-16bit-abc"
    found.mkdir(parents=True)
    assert quantized_source(found) is None
    (found / "quantized_source.json").write_text(json.dumps({"path": "/w", "scheme": "mlx-4bit-64"}))
    assert quantized_source(found) == (Path("/w"), "mlx-4bit-64")


def test_a_view_that_is_there_needs_no_cache_that_can_be_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mlx_quantized, "write_16bit", lambda model, out, say: out.mkdir(parents=True))
    one, other = (shutil.copytree(tiny_llama, tmp_path / name / "model") for name in ("one", "other"))
    for folder in (one, other):
        config = json.loads((folder / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 32}}
        (folder / "config.json").write_text(json.dumps(config))
        found = view(ModelFolder(folder), "model", print)
        assert quantized_source(found) == (folder, "mlx-4bit-32")  # where it lies now

    def read_only(*given: object) -> None:
        raise PermissionError

    monkeypatch.setattr(mlx_quantized, "artifact_lock", read_only)
    assert view(ModelFolder(other), "model", print) == found
    with pytest.raises(PermissionError):
        view(ModelFolder(one), "model", print)


def test_a_layer_without_bits_of_its_own_has_the_models() -> None:
    packed = np.arange(8, dtype=np.uint32).reshape(2, 4)
    parts = {"x.weight": packed, "x.scales": np.ones((2, 1), np.float16), "x.biases": np.zeros((2, 1), np.float16)}
    settings = {"bits": 4, "group_size": 32}
    plain = _shard(parts, settings, Path("s"))
    named = _shard(parts, settings | {"x": {"group_size": 32}}, Path("s"))
    np.testing.assert_array_equal(named["x.weight"].view(np.uint16), plain["x.weight"].view(np.uint16))

"""Where the quantized weights behind a 16-bit view are, and whose word is taken for it."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.models.mlx_quantized import _shard, quantized_source
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
    view = cache_folder() / "models" / "m-16bit-abc"
    view.mkdir(parents=True)
    assert quantized_source(view) is None
    (view / "quantized_source.json").write_text(json.dumps({"path": "/w", "scheme": "mlx-4bit-64"}))
    assert quantized_source(view) == (Path("/w"), "mlx-4bit-64")


def test_a_layer_without_bits_of_its_own_has_the_models() -> None:
    packed = np.arange(8, dtype=np.uint32).reshape(2, 4)
    parts = {"x.weight": packed, "x.scales": np.ones((2, 1), np.float16), "x.biases": np.zeros((2, 1), np.float16)}
    settings = {"bits": 4, "group_size": 32}
    plain = _shard(parts, settings, Path("s"))
    named = _shard(parts, settings | {"x": {"group_size": 32}}, Path("s"))
    np.testing.assert_array_equal(named["x.weight"].view(np.uint16), plain["x.weight"].view(np.uint16))

"""What a model's folder says of itself, and that each file of it is read once."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from common.errors import UserError
from common.models import model_folder
from common.models.families import text_config
from common.models.model_folder import ModelFolder, is_model_folder
from tests.unit.base_folder import CONFIG, write_base


def test_every_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = write_base(tmp_path, shards=3), Counter[str]()
    for name in ("read_json", "read_header"):
        real = getattr(model_folder, name)
        monkeypatch.setattr(
            model_folder, name, lambda path, *rest, real=real: (read.update([path.name]), real(path, *rest))[1]
        )
    model = ModelFolder(folder)
    assert not read
    for _ in range(2):
        assert model.config == text_config(CONFIG)
        assert model.written_config == CONFIG
        assert (model.model_type, model.vocabulary_size, model.dtype) == ("llama", CONFIG["vocab_size"], "bfloat16")
        assert model.weight_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert model.parameter_count == sum(math.prod(tensor.shape) for tensor in model.tensors.values())
        assert set(model.full_names) == set(model.tensors)
        assert not model.has_vision
        assert len(model.content_hash()) == 64
    assert read == Counter(["config.json", *(path.name for path in folder.glob("*.safetensors"))])


def test_the_contents_are_hashed_once(tmp_path: Path) -> None:
    model, steps = ModelFolder(write_base(tmp_path)), []
    for _ in range(2):
        model.content_hash(lambda share, text: steps.append(text))
    assert steps == sorted(model.tensors)


def test_the_most_frequent_type_is_the_folders(tmp_path: Path) -> None:
    import ml_dtypes
    import numpy as np

    weights = {"a": np.zeros(4, ml_dtypes.bfloat16), "b": np.zeros(3, np.float16), "c": np.zeros(1, np.float32)}
    assert ModelFolder(write_base(tmp_path / "bf16", weights=weights)).dtype == "bfloat16"
    weights["c"] = np.zeros(3, np.float32)
    assert ModelFolder(write_base(tmp_path / "fp32", weights=weights)).dtype == "float32"


def test_a_tensors_bytes_come_in_pieces(tmp_path: Path) -> None:
    folder = write_base(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    for tensor in ModelFolder(folder).tensors.values():
        pieces = list(tensor.chunks(7))
        assert b"".join(pieces) == data[tensor.start : tensor.start + tensor.size]
        assert max(map(len, pieces)) == 7


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert not is_model_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        _ = ModelFolder(tmp_path).config
    assert caught.value.what == f"{tmp_path} has no config.json."
    (tmp_path / "config.json").write_text(json.dumps([]))
    assert is_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"config\.json is not a JSON object"):
        _ = ModelFolder(tmp_path).config

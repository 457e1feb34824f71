"""The fused folder: complete, ending where training ended, and whole or not there."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.models.model_folder import ModelFolder
from common.verify.tiny_models import write_tiny
from tests.progress import silent
from tests.unit.base_folder import CONFIG, Q, write_base


def adapter(name: str = Q) -> Adapter:
    weight = LoraWeight(np.ones((1, 8), np.float32), np.ones((8, 1), np.float32), 2.0)
    return Adapter("some/model", 1, 0.0, {name: weight})


def fused(base: Path, stops: list[int], out: Path | None = None) -> Path:
    out = out or base.parent / "run" / "fused"
    write_fused(ModelFolder(base), adapter(), out, ServingConfig(stops), lambda share, text: None)
    return out


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_is_complete(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        (base / name).write_text("{}" if name.endswith(".json") else name)
    (base / "pytorch_model.bin").write_text("old")
    out = fused(base, [])
    assert {path.name for path in out.iterdir()} >= {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert not (out / "pytorch_model.bin").exists()


def test_a_phi_3_opens_in_transformers_4(tmp_path: Path) -> None:
    """Which refuses any other key in its longrope."""
    base = write_tiny(tmp_path / "base", "phi3")
    write_fused(ModelFolder(base), Adapter("", 4, 0.0, {}), tmp_path / "fused", ServingConfig([2]), silent)
    rope = read(tmp_path / "fused" / "config.json")["rope_scaling"]
    assert rope.keys() == {"type", "short_factor", "long_factor"}


def test_the_config_is_normalized(tmp_path: Path) -> None:
    config = read(fused(write_base(tmp_path / "base"), []) / "config.json")
    assert (config["rope_theta"], config["head_dim"], config["rope_parameters"]) == (
        5000.0,
        4,
        CONFIG["rope_parameters"],
    )


def test_the_sampling_of_the_family_where_the_base_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    plain = read(fused(base, [], tmp_path / "plain") / "generation_config.json")
    assert not plain.keys() & {"do_sample", "temperature", "top_k"}
    monkeypatch.setattr("common.export.model_sampling._FAMILIES", {"llama": {"off": {"temperature": 0.5, "top_k": 9}}})
    found = read(fused(base, [], tmp_path / "family") / "generation_config.json")
    assert found == plain | {"do_sample": True, "temperature": 0.5, "top_k": 9}
    own = {"temperature": 0.5, "top_k": 9, "do_sample": False, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(own))
    assert read(fused(base, [], tmp_path / "own") / "generation_config.json") == own


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "NOTICE"])
def test_the_license_goes_along(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    (base / name).write_text("terms")
    assert (fused(base, []) / name).read_text() == "terms"


@pytest.mark.parametrize(
    ("generation", "stops", "ends"),
    [
        (None, [], 2),  # the config's
        (None, [4], [2, 4]),
        (None, [2], 2),
        ({"eos_token_id": 3}, [4, 3], [3, 4]),
        ({"eos_token_id": [3, 1]}, [4, 1], [3, 1, 4]),
        ({"eos_token_id": None}, [4], 4),
    ],
)
def test_the_generation_config_ends_where_the_trained_turns_end(
    tmp_path: Path, generation: dict | None, stops: list[int], ends: int | list[int]
) -> None:
    base = write_base(tmp_path / "base")
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps({"temperature": 0.5, **generation}))
    content = read(fused(base, stops) / "generation_config.json")
    assert content["eos_token_id"] == ends
    assert content.get("temperature") == (0.5 if generation is not None else None)


def test_the_exported_tokenizer_ends_where_the_trained_turns_end(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<turn|>"}]}))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": "old"}))
    out = tmp_path / "out"
    write_fused(ModelFolder(base), adapter(), out, ServingConfig([7, 2], "new"), lambda share, text: None)
    assert read(out / "tokenizer_config.json") == {"eos_token": "<turn|>"}
    assert (out / "chat_template.jinja").read_text() == "new"


@pytest.mark.parametrize(("known", "end"), [("<eos>", "<turn|>"), ("<end>", "<end>"), ({"content": "<end>"}, None)])
def test_an_end_that_is_one_of_the_trained_ones_stays(tmp_path: Path, known: object, end: str | None) -> None:
    base = write_base(tmp_path / "base")
    added = [{"id": 7, "content": "<turn|>"}, {"id": 8, "content": "<end>"}]
    (base / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": known}))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": known}))
    out = tmp_path / "out"
    write_fused(ModelFolder(base), adapter(), out, ServingConfig([7, 8]), lambda share, text: None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read(out / name)["eos_token"] == (end or known)


def test_a_failure_leaves_no_half_written_folder(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base"), tmp_path / "fused"
    with pytest.raises(UserError):
        write_fused(
            ModelFolder(base),
            adapter("model.layers.9.self_attn.q_proj"),
            out,
            ServingConfig([]),
            lambda share, text: None,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_failure_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    out = fused(base, [], tmp_path / "fused")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (base / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        fused(base, [], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "fused"]


def test_fusing_again_replaces_the_folder(tmp_path: Path) -> None:
    out = fused(write_base(tmp_path / "base"), [])
    (out / "left.over").write_text("")
    assert not (fused(tmp_path / "base", []) / "left.over").exists()

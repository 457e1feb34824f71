"""Files of strangers that a library cannot read, or that hold what no reader expects: one line says which and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.data.encode import Encoder, MaskingOptions, load_tokenizer
from common.errors import UserError
from common.export.fused_folder import ServingConfig, _write_served
from common.llama_cpp import lora
from common.llama_cpp.convert import report
from common.models.config_kinds import kind_faults
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.training.metrics import Metrics
from common.verify.tiny_models import tiny_config
from tests.faults.fuzz_models import write_gguf, write_gguf_lora
from tests.tiny import FAMILIES, MULTIMODAL, write_model, write_tokenizer
from tests.unit.base_folder import Q, write_base

HTML = b"<!DOCTYPE html><html><body>404</body></html>"


def quiet(text: str) -> None: ...


# --- config.json


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in MULTIMODAL])
def test_sound_configs_have_no_fault(kind: str) -> None:
    assert kind_faults(tiny_config(kind)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is '1000000000000', and should be 1 to 1000"),
        ({"hidden_size": "8"}, "hidden_size is '8', and should be a whole number from 1"),
        ({"num_attention_heads": True}, "num_attention_heads is 'True'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', and should be a list of names"),
        ({"text_config": [1]}, "text_config is not an object"),
        ({"text_config": {"hidden_size": 0}}, "text_config.hidden_size is '0'"),
        ({"rope_parameters": []}, "rope_parameters is not an object"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta is '-1', and should be a number above 0"),
        ({"rope_scaling": {"full_attention": {"factor": 10**400}}}, "rope_scaling.full_attention.factor is"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types has 9 entries, one for each layer it should have"),
        ({"layer_types": [{}]}, "layer_types is '[{}]'"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', and should be true or false"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = write_base(tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="cannot be trained") as caught:
        resolve(str(folder), quiet)
    assert words in caught.value.what
    assert "config.json" in caught.value.what


def test_a_config_that_says_other_sizes_than_its_weights_have(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"its config\.json says 3 layers, and its weights have 1"):
        resolve(str(folder), quiet)
    path.write_text(json.dumps(config | {"vocab_size": 6}))
    with pytest.raises(UserError, match=r"embed_tokens.weight has the shape \(5, 8\), .* \(6, 8\)"):
        resolve(str(folder), quiet)
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{Q}.weight": np.zeros(8, np.float32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"q_proj.weight has the shape \(8,\)"):
        resolve(str(folder), quiet)


@pytest.mark.parametrize("content", ["[1]", '{"weight_map": ["a"]}', '{"weight_map": {"a": [1]}}', "{}", "\ufeff{}"])
def test_an_index_of_another_shape(tmp_path: Path, content: str) -> None:
    folder = write_base(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged|weights are missing"):
        resolve(str(folder), quiet)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"eos_token_id": ["2"]}, "eos_token_id is"),
        ({"eos_token_id": 10**30}, "eos_token_id is"),
        ({"temperature": "0.7"}, "temperature is '0.7', and should be a number"),
    ],
)
def test_a_generation_config_of_another_kind(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"generation_config\.json holds what it should not") as caught:
        _ = ModelFolder(tmp_path).end_ids
    assert words in caught.value.what


def test_ends_of_an_answer_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert ModelFolder(tmp_path).end_ids == []
    path.write_text('{"eos_token_id": 3}')
    assert ModelFolder(tmp_path).end_ids == [3]
    path.write_bytes(b'\xef\xbb\xbf{"eos_token_id": 3}')
    with pytest.raises(UserError, match="is not JSON"):
        _ = ModelFolder(tmp_path).end_ids


# --- tokenizers


def changed_tokenizer(folder: Path, name: str, **changes: Any) -> Path:
    write_tokenizer(folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    return folder


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "OfANewerVersion"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": 1.5}),
        ("tokenizer_config.json", {"bos_token": {"content": [1]}}),
    ],
)
def test_a_tokenizer_that_the_library_cannot_load(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder = changed_tokenizer(tmp_path, name, **changes)
    with pytest.raises(UserError, match=f"{folder}: its tokenizer cannot be loaded: "):
        load_tokenizer(folder)


def test_a_tokenizer_beside_a_config_that_the_library_refuses(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": "2"}))
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: .*pad_token_id"):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_encode(tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path, "tokenizer_config.json", model_max_length="many")
    with pytest.raises(UserError, match=f"{folder}: its tokenizer cannot encode a text: "):
        Encoder(load_tokenizer(folder), MaskingOptions())


def test_added_tokens_of_another_shape_name_no_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [1, {"id": "2"}, {"id": 2, "content": "</s>"}]}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {}, "3": [], "4": {"content": 1}}}')
    _write_served(tmp_path, ServingConfig([2, 3]))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


# --- GGUF


@pytest.mark.parametrize("damage", ["cut", "empty", "web page", "tensors cut"])
def test_a_damaged_gguf_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:900], "empty": b"", "web page": HTML, "tensors cut": whole[:-5_000]}[damage])
    with pytest.raises(UserError, match=f"{path} cannot be read as a GGUF: ") as caught:
        resolve(str(path), quiet)
    assert "\n" not in caught.value.what
    assert not list((tmp_path / "cache" / "twintune" / "models").iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "web page"])
def test_a_damaged_lora_gguf(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "lora.gguf"
    write_gguf_lora(path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:200], "empty": b"", "web page": HTML}[damage])
    with pytest.raises(UserError, match=f"{path} cannot be read as a GGUF: "):
        lora._tensors(path)


@pytest.mark.parametrize("length", range(3, 900, 13))
def test_a_report_of_a_gguf_that_ends_too_early(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_lora(path)
    path.write_bytes(path.read_bytes()[: min(length, 300)])
    with pytest.raises(UserError, match="is not a complete GGUF file"):
        report(path, "Q4_K_M")


# --- metrics.jsonl


def test_metrics_that_are_not_lines_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 0.5}', b"\xff\xfe", b'{"step": "2"}', b"[2]", b'{"step": 2, "loss": NaN}', b'{"st']
    path.write_bytes(b"\n".join(lines))
    Metrics(path, 2, False, print).close()
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n'

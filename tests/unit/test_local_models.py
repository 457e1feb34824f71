"""Models that lie on a machine are found, and nothing that a stranger's file says does harm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.models.local_models import HUB, local_models, named_model
from common.models.resolve import resolve
from tests.tiny import write_model

REVISION = "a" * 40
GGUF = b"GGUF\x03\x00\x00\x00 and more"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr("common.models.local_models._OLLAMA_SERVICE", tmp_path / "service")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def found(home: Path) -> list[tuple[str, str, str]]:
    return [(one.model, one.name, one.where) for one in local_models(home, home / "here")]


def ollama(root: Path, name: str, manifest: Any = None, blob: bytes = GGUF) -> Path:
    digest = "0" * 63 + "1"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    path = root / "manifests" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"layers": [layer]}) if manifest is None else manifest)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(blob)
    return root / "blobs" / f"sha256-{digest}"


def test_an_empty_machine(home: Path) -> None:
    assert found(home) == []


def test_the_hubs_cache(home: Path) -> None:
    model = home / "hub" / "models--some--model"
    write_model(model / "snapshots" / REVISION)
    assert found(home) == []
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    (one,) = local_models(home, home / "here")
    assert (one.model, one.where, one.is_here) == ("some/model", "the hub's cache", True)
    assert one.config is not None
    assert one.config["model_type"] == "llama"
    assert one.size > 100_000


@pytest.mark.parametrize("revision", ["../../elsewhere", "main", "", "A" * 40])
def test_a_revision_of_the_hubs_cache_is_no_path(home: Path, revision: str) -> None:
    model = home / "hub" / "models--some--model"
    write_model(home / "hub" / "elsewhere")
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(revision)
    assert found(home) == []


@pytest.mark.parametrize("damage", ["weights", "tokenizer", "config", "architecture", "fp8"])
def test_a_folder_that_cannot_be_trained_is_left_out(home: Path, damage: str) -> None:
    folder = write_model(home / "here" / "tiny")
    assert found(home) == [("./tiny", "tiny", "this folder")]
    if damage in ("architecture", "fp8"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["Strange"]} if damage == "architecture" else {}
        config |= {"quantization_config": {"quant_method": "fp8"}} if damage == "fp8" else {}
        (folder / "config.json").write_text(json.dumps(config))
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        (folder / {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}[damage]).unlink()
    assert found(home) == []


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        ("registry.ollama.ai/library/gemma3/1b", "gemma3:1b"),
        ("registry.ollama.ai/me/mine/latest", "me/mine:latest"),
        ("hf.co/owner/name/Q4_K_M", "hf.co/owner/name:Q4_K_M"),
    ],
)
def test_ollamas_models_by_the_names_that_it_shows(home: Path, manifest: str, name: str) -> None:
    blob = ollama(home / ".ollama" / "models", manifest)
    assert found(home) == [(str(blob), name, "Ollama")]


def test_ollama_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = ollama(home / "service", "registry.ollama.ai/library/a/b")
    assert found(home) == [(str(blob), "a:b", "Ollama")]
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "own"))
    assert found(home) == []


@pytest.mark.parametrize(
    "manifest",
    [
        *("", "{", "[]", "null", "{}", '{"layers": 3}', '{"layers": [3]}', '{"layers": [{}]}', "[" * 10_000),
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model"}]}',
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../etc/passwd"}]}',
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": ["sha256"]}]}',
        '{"layers": [{"mediaType": ["a"], "digest": 3}]}',
    ],
)
def test_a_broken_manifest_is_left_out(home: Path, manifest: str) -> None:
    ollama(home / ".ollama" / "models", "registry.ollama.ai/library/a/b", manifest)
    assert found(home) == []


def test_a_manifest_whose_blob_is_no_gguf_or_is_gone(home: Path) -> None:
    blob = ollama(home / ".ollama" / "models", "registry.ollama.ai/library/a/b", blob=b"safetensors")
    assert found(home) == []
    blob.unlink()
    assert found(home) == []


@pytest.mark.parametrize("root", [".lmstudio/models", ".cache/lm-studio/models"])
def test_lm_studios_ggufs_and_folders(home: Path, root: str) -> None:
    folder = home / root / "pub"
    write_model(folder / "folder")
    (folder / "repo").mkdir()
    for name in ("m-Q4_K_M.gguf", "mmproj-m.gguf", "m-00001-of-00002.gguf"):
        (folder / "repo" / name).write_bytes(GGUF)
    assert found(home) == [
        (str(folder / "folder"), "pub/folder", "LM Studio"),
        (str(folder / "repo" / "m-Q4_K_M.gguf"), "pub/repo/m-Q4_K_M.gguf", "LM Studio"),
    ]


def test_a_file_is_a_gguf_by_its_contents(home: Path) -> None:
    (home / "here" / "a.gguf").write_bytes(GGUF)
    (home / "here" / "b.gguf").write_bytes(b"no")
    (home / "here" / "c.gguf").mkdir()
    os.mkfifo(home / "here" / "d.gguf")  # to read it would wait for ever
    assert found(home) == [("a.gguf", "a.gguf", "this folder")]


def test_a_name_that_could_write_a_line_of_yaml_is_left_out(home: Path) -> None:
    write_model(home / "here" / "x\npush: me")
    (home / "here" / "a\x1b[2J.gguf").write_bytes(GGUF)
    assert found(home) == []


def test_one_model_in_two_places_is_listed_once(home: Path) -> None:
    blob = ollama(home / ".ollama" / "models", "registry.ollama.ai/library/a/b")
    (home / "here" / "a.gguf").symlink_to(blob)
    assert len(found(home)) == 1


def test_a_model_is_named_by_its_path_its_name_or_the_hubs_name(home: Path) -> None:
    write_model(home / "here" / "tiny")
    write_model(home / "apart")
    known = local_models(home, home / "here")
    assert named_model("tiny", known) == named_model("./tiny", known) == known[0]
    assert named_model(str(home / "apart"), known).where == "this machine"
    published = named_model("google/gemma-3-1b-it", known)
    assert (published.where, published.size, published.is_here) == (HUB, 1_999_771_904, False)
    assert named_model("who/knows", known).config is None


@pytest.mark.parametrize("text", ["", "nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_what_names_no_model(home: Path, text: str) -> None:
    with pytest.raises(UserError, match="--model"):
        named_model(text, [])


def test_a_folder_that_is_named_and_cannot_be_trained_says_why(home: Path) -> None:
    folder = write_model(home / "apart")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="it has no weights"):
        named_model(str(folder), [])


def test_a_gguf_that_is_named_is_looked_into(home: Path) -> None:
    (home / "here" / "a.gguf").write_bytes(GGUF)
    with pytest.raises(UserError, match="cannot be read as a GGUF"):
        named_model("a.gguf", local_models(home, home / "here"))


def test_a_gguf_of_ollama_is_a_model_to_train_though_it_has_no_ending(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = ollama(home / ".ollama" / "models", "registry.ollama.ai/library/a/b")
    made = write_model(home / "made")
    monkeypatch.setattr("common.models.resolve.from_gguf", lambda path, say: made if path == blob else None)
    assert resolve(str(blob), print).path == made

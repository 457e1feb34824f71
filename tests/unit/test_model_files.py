"""What of a stranger's model folder reaches tokenizers, converters, and whoever the result is given to."""

import ast
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from common.backend import Adapter
from common.errors import UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.convert import convert
from common.llama_cpp.install import LlamaCpp
from common.model_files import HUB_FILES, HUB_IGNORED, license_files, names_code, open_tokenizer, scrubbed
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.system.process import offline_environment
from tests import ROOT
from tests.progress import silent
from tests.tiny import write_model
from tests.traps import trap_model

NOTHING = Adapter("", 2, 0.0, {})


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        resolve(str(folder), print)
    return caught.value.what


def everything(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_neither_code_nor_its_names_come_into_a_scrubbed_folder(tmp_path: Path) -> None:
    folder = trap_model(tmp_path / "model", tmp_path / "marker")
    with scrubbed(folder, weights=True) as clean:
        assert clean.name == "model"
        names = {path.name for path in clean.iterdir()}
        assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
        assert not [name for name in names if name.endswith(".py") or name in ("notes.md", "LICENSE")]
        configs = [json.loads((clean / name).read_text()) for name in names if name.endswith("config.json")]
        assert not [config for config in configs if "auto_map" in json.dumps(config) or "evil" in json.dumps(config)]
        assert (clean / "model.safetensors").resolve() == (folder / "model.safetensors").resolve()
        place = clean
    assert not place.exists()


def test_a_word_of_the_vocabulary_is_not_taken_for_a_name_of_code(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    vocabulary = {"auto_map": 7, "a": 8}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with scrubbed(folder) as clean:
        assert json.loads((clean / "vocab.json").read_text()) == vocabulary


def test_opening_a_tokenizer_runs_nothing_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append("asked") or "y")
    folder = trap_model(tmp_path / "model", tmp_path / "marker")
    assert open_tokenizer(folder)("a")["input_ids"] == open_tokenizer(write_model(tmp_path / "plain"))("a")["input_ids"]
    assert asked == []
    assert not (tmp_path / "marker").exists()
    from transformers import AutoTokenizer

    with suppress(AttributeError):  # the code is a stub, and no tokenizer
        AutoTokenizer.from_pretrained(folder)
    assert asked  # so the trap is one: without these precautions it asks, and on a yes it snaps
    assert (tmp_path / "marker").exists()


def test_the_fused_folder_names_and_holds_no_code(tmp_path: Path) -> None:
    folder = trap_model(tmp_path / "model", tmp_path / "marker")
    write_fused(ModelFolder(folder), NOTHING, tmp_path / "fused", ServingConfig([2]), silent)
    names = [path.name for path in (tmp_path / "fused").iterdir()]
    assert "LICENSE" in names
    assert not [name for name in names if name.endswith(".py")]
    assert "auto_map" not in everything(tmp_path / "fused")
    assert "evil" not in everything(tmp_path / "fused")


def test_the_fused_folder_reads_images_and_videos_as_the_base_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    for name in names:
        (folder / name).write_text(
            json.dumps({"size": {"longest_edge": len(name)}, "auto_map": {"AutoProcessor": "x"}})
        )
    write_fused(ModelFolder(folder), NOTHING, tmp_path / "fused", ServingConfig([2]), silent)
    for name in names:
        assert json.loads((tmp_path / "fused" / name).read_text()) == {"size": {"longest_edge": len(name)}}


def test_the_converter_sees_a_scrubbed_folder_and_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that does what llama.cpp's may: looks at every file, and at its environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder, seen = trap_model(tmp_path / "model", tmp_path / "marker"), tmp_path / "seen.json"
    converter = tmp_path / "convert.py"
    converter.write_text(
        "import json, os, sys\nfolder, out = sys.argv[1], sys.argv[sys.argv.index('--outfile') + 1]\n"
        "config = open(folder + '/config.json').read()\n"
        "seen = {'files': os.listdir(folder), 'env': dict(os.environ), 'config': config, 'argv': sys.argv[1:]}\n"
        f"open({str(seen)!r}, 'w').write(json.dumps(seen))\nopen(out, 'w').write('x')\n"
    )
    llama = LlamaCpp(converter, tmp_path, tmp_path, "test", "1")
    convert(folder, tmp_path / "m.gguf", "-evil", llama, silent)
    found = json.loads(seen.read_text())
    assert not [name for name in found["files"] if name.endswith(".py")]
    assert "auto_map" not in found["config"]
    assert "hf_secret" not in str(found["env"])
    # no name is taken for an option
    assert "--model-name=-evil" in found["argv"]
    plain = [word for word in found["argv"] if not word.startswith("--") and word != "bf16"]
    assert [word for word in plain if not Path(word).is_absolute()] == []


def test_the_tools_environment_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    env = offline_environment()
    assert "hf_secret" not in env.values()
    assert env["PATH"] == os.environ["PATH"]


def test_only_texts_are_license_files(tmp_path: Path) -> None:
    names = ("LICENSE", "LICENSE.txt", "NOTICE.md", "USE_POLICY.md", "LICENSE.PDF", "LICENSE-APACHE-2.0")
    for name in (*names, "LICENSE.py", "NOTICE.so", "SAFETY_tok.py", "LICENSE.pyc"):
        (tmp_path / name).write_text("")
    assert license_files(tmp_path) == sorted(names)


def test_no_code_is_fetched_from_the_hub() -> None:
    offered = [
        "config.json",
        "LICENSE",
        "LICENSE-MIT",
        "NOTICE.txt",
        "LICENSE.py",
        "SAFETY_tok.py",
        "NOTICE.pyc",
        "x.py",
    ]
    found = filter_repo_objects(offered, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    assert list(found) == ["config.json", "LICENSE", "LICENSE-MIT", "NOTICE.txt"]


# --- links


@pytest.mark.parametrize("name", ["LICENSE", "merges.txt", "tokenizer.json", "model.safetensors", "README.md"])
def test_a_link_that_leads_out_of_a_model_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder, secret = write_model(tmp_path / "model"), tmp_path / "id_rsa"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (folder / name).symlink_to(secret)
    assert refused(folder) == f"--model {folder}: links in it lead out of the folder: {name} to {secret}."


def test_a_scrubbed_folder_follows_no_such_link_either(tmp_path: Path) -> None:
    """A run's fused folder is never resolved, and may be a stranger's too."""
    folder, secret = write_model(tmp_path / "model"), tmp_path / "secret"
    secret.write_text("{}")
    (folder / "vocab.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"vocab\.json is a link that leads out of its folder"), scrubbed(folder):
        pass


@pytest.mark.parametrize("ours", [True, False], ids=["the user's cache", "a cache somewhere else"])
def test_links_within_the_folder_and_into_the_hubs_blobs_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    made, cache = write_model(tmp_path / "made"), tmp_path / "hub"
    if ours:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--me--tiny" / "snapshots" / "abc"
    blobs, shared = cache / "models--me--tiny" / "blobs", cache / "blobs" / "ab"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(made.iterdir())):
        if ours and number % 2:
            path.rename(shared / str(number))  # huggingface_hub 2.4: a blob may be a link to one that all share
            (blobs / str(number)).symlink_to(shared / str(number))
        else:
            path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "LICENSE").write_text("MIT License")
    (snapshot / "LICENSE.txt").symlink_to("LICENSE")
    assert resolve(str(snapshot), print).path == snapshot
    with scrubbed(snapshot, weights=True) as clean:
        assert (clean / "model.safetensors").is_file()
    if ours:  # as `hf download --local-dir` once made them
        (tmp_path / "local").mkdir()
        for path in (path for path in snapshot.iterdir() if not path.name.startswith("LICENSE")):
            (tmp_path / "local" / path.name).symlink_to(path.resolve())
        assert resolve(str(tmp_path / "local"), print).path == tmp_path / "local"


def test_a_folder_that_only_looks_like_the_hubs_cache_gets_nothing_from_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "theirs" / "snapshots" / "abc")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("x")
    (folder / "LICENSE").symlink_to(tmp_path / "blobs" / "secret")
    assert "LICENSE to " in refused(folder)


def test_a_fused_folders_weights_may_be_no_stray_link_either(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match="leads out of its folder"), scrubbed(folder, weights=True):
        pass


def test_a_folder_with_code_is_known_as_such(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert not names_code(folder)
    (folder / "evil.py").write_text("")
    assert names_code(folder)
    (folder / "evil.py").unlink()
    (folder / "config.json").write_text('{"\\u0061uto_map": {}}')
    assert names_code(folder)
    with scrubbed(folder) as clean:
        assert json.loads((clean / "config.json").read_text()) == {}


# --- so that it cannot come back


def _calls(folder: str) -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                found.append((f"{path.name}:{node.lineno}", node))
    return found


def _trusts(call: ast.Call) -> bool:
    values: list[Any] = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
    return not (len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is False)


OURS = ("common", "torch_backend", "mlx_backend", "examples", "benchmarks")


def test_every_from_pretrained_says_that_no_remote_code_is_trusted() -> None:
    calls = [call for folder in OURS for call in _calls(folder)]
    assert len(calls) >= 4
    assert [place for place, call in calls if _trusts(call)] == []

"""The cache: one process at a time makes an artifact, and another artifact does not wait for it."""

import shlex
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest

from common.display import Display
from common.errors import UserError
from common.files import file_digest
from common.llama_cpp import convert
from common.llama_cpp.install import LlamaCpp
from common.models import gguf_import
from common.system.cache import artifact_lock, cache_folder, pip_download
from tests.unit.base_folder import write_base


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)


def never(text: str) -> None:
    raise AssertionError(text)


def test_another_process_waits_and_says_so() -> None:
    artifact, waiting, entered = cache_folder() / "models" / "a", threading.Event(), threading.Event()
    texts: list[str] = []

    def say(text: str) -> None:
        texts.append(text)
        waiting.set()

    def second() -> None:
        with artifact_lock(artifact, say):
            entered.set()

    with artifact_lock(artifact, never):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert not entered.is_set()
    thread.join(30)
    assert entered.is_set()
    assert texts == ["waiting for another process, which is making a"]


def test_other_artifacts_do_not_wait() -> None:
    with artifact_lock(cache_folder() / "models" / "a", never), artifact_lock(cache_folder() / "b" / "a", never):
        pass


def test_a_model_that_is_there_needs_no_cache_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*given: object) -> None:
        raise PermissionError

    monkeypatch.setattr(gguf_import, "artifact_lock", read_only)
    path, mirror = tmp_path / "x.gguf", next(iter(gguf_import.MIRRORS.values()))
    path.write_bytes(b"GGUF")
    for make in (lambda: gguf_import.from_gguf(path, never), lambda: gguf_import.mirror_gguf(mirror, never)):
        with pytest.raises(PermissionError):
            make()
    made = cache_folder() / "models" / f"x-{file_digest(path)[:12]}-{gguf_import._CHECKS}"
    fetched = cache_folder() / "downloads" / mirror.file
    for folder in (made, fetched):
        folder.mkdir(parents=True)
    assert gguf_import.from_gguf(path, never) == made
    assert gguf_import.mirror_gguf(mirror, never) == fetched


def test_a_failure_releases_the_lock() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), artifact_lock(cache_folder() / "a", never):
            raise RuntimeError


def test_a_base_gguf_is_made_once_and_no_lock_is_asked_for_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def write(base: Path, out: Path, *rest: object, **more: object) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"bf16")

    monkeypatch.setattr(convert, "convert", write)

    def quantize(source: Path, out: Path, quant: str, *rest: object) -> None:
        made.append(quant)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(quant.encode())

    monkeypatch.setattr(convert, "quantize", quantize)
    llama = LlamaCpp(tmp_path, tmp_path, tmp_path, "test", "1")
    for quant in ("Q4_K_M", "Q4_K_M", "Q8_0"):
        found = convert.base_gguf(tmp_path, "f00d", quant, llama, Display("quiet"))
        assert found.read_text() == quant
    assert made == ["Q4_K_M", "Q8_0"]
    for quant, plain in (("IQ2_M", "Q2_K"), ("Q2_K_S", "Q2_K"), ("IQ3_XXS", "Q3_K_S")):  # no importance matrix
        assert convert.base_gguf(tmp_path, "f00d", quant, llama, Display("quiet")).name == f"{plain}.gguf"
    assert convert.base_gguf(tmp_path, "f00d", "F32", llama, Display("quiet")).read_text() == "bf16"  # is not quantized
    assert not found.with_name("BF16.gguf").exists()
    with artifact_lock(found.parent, never):  # what is there is served while another type is made
        assert convert.base_gguf(tmp_path, "f00d", "Q8_0", llama, Display("quiet")) == found
    newer = LlamaCpp(tmp_path, tmp_path, tmp_path, "test", "2")
    assert convert.base_gguf(tmp_path, "f00d", "Q8_0", newer, Display("quiet")) != found


@pytest.mark.parametrize("fails", ["convert", "quantize"])
def test_a_base_gguf_that_fails_leaves_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("no luck", "Try again.")

    monkeypatch.setattr(convert, "convert", lambda base, out, *rest: (out.parent.mkdir(parents=True), out.touch()))
    monkeypatch.setattr(convert, fails, fail)
    with pytest.raises(UserError, match="no luck"):
        convert.base_gguf(tmp_path, "f00d", "Q4_K_M", LlamaCpp(tmp_path, tmp_path, tmp_path, "test", "1"), Display())
    assert [path.name for path in cache_folder().rglob("*.gguf")] == []


def test_a_full_cache_is_told_before_a_base_gguf_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    base = write_base(tmp_path / "base")
    with pytest.raises(UserError, match=r"0\.0 GB free, and this run will write up to .*untuned model's GGUFs"):
        convert.base_gguf(base, "f00d", "Q4_K_M", LlamaCpp(tmp_path, tmp_path, tmp_path, "test", "1"), Display())


def test_a_waiting_process_says_so_again_and_again() -> None:
    """A stage's progress shows the last text only, and in plain lines every ten seconds."""
    texts: list[str] = []

    def say(text: str) -> None:
        texts.append(text)
        if len(texts) == 3:
            raise UserError("enough", "")

    with (
        artifact_lock(cache_folder() / "a", never),
        pytest.raises(UserError, match="enough"),
        artifact_lock(cache_folder() / "a", say, every=0.1),
    ):
        pass
    assert len(set(texts)) == 1
    with artifact_lock(cache_folder() / "a", never):
        pass


@pytest.mark.parametrize(
    ("printed", "fix"),
    [
        ("No module named pip", f"Install pip: {shlex.quote(sys.executable)} -m ensurepip, or with uv: uv pip install"),
        ("ERROR: Could not find a version", "Check the network and pip's settings (pip config list), or give a local"),
    ],
)
def test_an_environment_without_pip_is_told_from_a_want_of_network(
    printed: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.system.cache.run_logged", lambda *given: (1, f"/bin/python3: {printed}\n"))
    with pytest.raises(UserError) as caught:
        pip_download("a==1", "f00d", tmp_path)
    assert caught.value.what == f"pip could not download a==1:\n/bin/python3: {printed}"
    assert caught.value.fix.startswith(fix)

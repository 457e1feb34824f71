"""Folders that take seconds to make, made once a session."""

import os
import signal
from pathlib import Path

# Before MLX loads OpenBLAS: with two threads on tiny matrices it took six times as long here, waiting for itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A bug in an optional part of an export is a warning for users; a test, and the commands that it runs, fail.
os.environ["TWINTUNE_RAISE_BUGS"] = "1"
os.environ["TWINTUNE_LEARN_MEMORY"] = "0"  # what this machine has taught changes plans
if os.environ.get("TWINTUNE_TEST_DEVICE", "cpu") == "cpu":  # before anything imports Triton, which reads it then
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.tiny import write_model, write_tokenizer

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup: here and in what is started, hang-ups are tested
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background
    signal.signal(signal.SIGINT, signal.default_int_handler)


_FAST = {"unit", "torch", "mlx"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All but these folders are slow."""
    for item in items:
        if item.path.parent.parent != Path(__file__).parent or item.path.parent.name not in _FAST:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a ChatML template, and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Llama folder; nobody may write into it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")

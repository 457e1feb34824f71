"""Folders without tokenizer.model in the real llama.cpp: Gemma 3 270M itself, and tiny models with the vocabularies of
Llama 2 and Phi-3 out of llama.cpp's source. Every id must be transformers', control tokens included."""

from pathlib import Path

import numpy as np
import pytest

from common.backend import Adapter, LoraWeight
from common.data.encode import load_tokenizer
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
from common.models.model_folder import ModelFolder
from common.models.resolve import resolve
from common.models.sentencepiece import HARD_TEXTS as HARD
from common.models.shapes import linear_shapes
from common.verify.server_checks import verify_tokens
from common.verify.tiny_models import write_tiny
from tests.progress import silent
from tests.tiny_sentencepiece import write_llama_like

CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
GEMMA = "<bos><start_of_turn>user\nHi <td>there</td>\n\n\n<end_of_turn>\n<start_of_turn>model\n  Yes.<end_of_turn>\n"
LLAMA_2 = "<s>[INST] Hi there [/INST] Yes.</s><s>[INST]\n x</s>"
PHI_3 = "<s><|user|>\nHi there<|end|>\n<|assistant|>  Yes.<|end|></s>x<|endoftext|>"


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return ensure(None, silent)


@pytest.fixture
def served(llama: LlamaCpp, tmp_path: Path):
    def serve(base: Path, template: str | None = None) -> tuple[Path, Server]:
        """`base` with an adapter that changes nothing, fused, converted; its folder and a server yet to be entered."""
        [(name, (rows, columns)), *_] = linear_shapes(ModelFolder(base), ["o_proj"]).items()
        weight = LoraWeight(np.ones((1, columns), np.float32), np.zeros((rows, 1), np.float32), 1.0)
        fused = tmp_path / "fused"
        write_fused(
            ModelFolder(base), Adapter("x", 1, 0.0, {name: weight}), fused, ServingConfig([1], template), silent
        )
        convert(fused, tmp_path / "model.gguf", "model", llama, silent)
        return fused, Server(llama, tmp_path / "model.gguf", ServerOptions(context=256, threads=1))

    return serve


def write_vocabulary(folder: Path, llama: LlamaCpp, name: str) -> Path:
    """The tokenizer that transformers makes of one of llama.cpp's own vocabularies."""
    from transformers import AutoTokenizer

    source = llama.converter.parent / "models" / f"ggml-vocab-{name}.gguf"
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


@pytest.mark.long
def test_gemma_3_270m(served) -> None:
    base = resolve("google/gemma-3-270m", print).path
    assert not (base / "tokenizer.model").exists(), (
        "the mirror's folder has none; the hub's has, and tests nothing here"
    )
    fused, server = served(base, "{{ bos_token }}")
    with server:
        assert verify_tokens(load_tokenizer(fused), [*HARD, GEMMA], server) == []
        assert verify_tokens(load_tokenizer(base), [*HARD, GEMMA], server) == []
        turn = server.tokenize("<bos><start_of_turn>user\n")
    assert (turn[:2], len(turn)) == ([2, 105], 4)


@pytest.mark.long
def test_phi_3s_vocabulary(served, llama: LlamaCpp, tmp_path: Path) -> None:
    base = write_vocabulary(write_tiny(tmp_path / "base", "phi3", {"vocab_size": 32064}), llama, "phi-3")
    _, server = served(base)
    with server:
        assert verify_tokens(load_tokenizer(base), [*HARD, PHI_3], server) == []
        assert server.tokenize("<|user|>") == [32010]


def test_llama_2s_vocabulary(served, llama: LlamaCpp, tmp_path: Path) -> None:
    """Plain text has a space put before it; a chat, which begins with a control token, has none."""
    base = write_vocabulary(write_tiny(tmp_path / "base", "llama", {"vocab_size": 32000}), llama, "llama-spm")
    fused, server = served(base)
    with server:
        assert verify_tokens(load_tokenizer(base), [*HARD], server) == []
        assert server.tokenize("Hi") == [6324]  # "▁Hi"
    fused, server = served(base, CHAT)
    with server:
        assert verify_tokens(load_tokenizer(fused), [*HARD, LLAMA_2], server) == []
        assert verify_tokens(load_tokenizer(base), [LLAMA_2], server) == []
        assert server.tokenize("<s>Hi") == [1, 18567]  # "Hi"


def test_a_small_llama_like_vocabulary(served, tmp_path: Path) -> None:
    base = write_llama_like(write_tiny(tmp_path / "base", "mistral", {"vocab_size": 400}))
    _, server = served(base)
    texts = [*HARD, "<s>[INST] the cat[/INST]hello world</s>", "[INST]\nthe"]
    with server:
        assert verify_tokens(load_tokenizer(base), texts, server) == []


def test_a_base_is_converted_without_being_written_into(llama: LlamaCpp, tmp_path: Path) -> None:
    base = write_llama_like(write_tiny(tmp_path / "base", "llama", {"vocab_size": 400}))
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    convert(base, tmp_path / "model.gguf", "model", llama, silent)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    with Server(llama, tmp_path / "model.gguf", ServerOptions(context=256, threads=1)) as server:
        assert verify_tokens(load_tokenizer(base), [*HARD], server) == []

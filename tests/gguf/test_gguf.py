"""The real llama.cpp, built if it does not exist: convert, quantize, count types, compare tokens, answer.

The model is tiny and random; its vocabulary is GPT-2's own, which lies in llama.cpp's source, with the texts that
llama.cpp tests its tokenizers on.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.data.encode import load_tokenizer
from common.errors import UserError
from common.llama_cpp.build import ensure
from common.llama_cpp.convert import QuantReport, convert, quantize, report
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
from common.verify.server_checks import verify_tokens
from common.verify.tiny_models import tiny_config

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
LAYERS = 2


def quiet(done: float, text: str) -> None:
    assert 0.0 <= done <= 1.0, text


@pytest.fixture(scope="module")
def llama() -> LlamaCpp:
    return ensure(None, quiet)


def vocabulary(llama: LlamaCpp) -> Path:
    path = llama.converter.parent / "models" / "ggml-vocab-gpt-2.gguf"
    assert path.is_file(), f"{path} is missing: this tier wants llama.cpp with its source (unset LLAMA_CPP_DIR)"
    return path


@pytest.fixture(scope="module")
def texts(llama: LlamaCpp) -> list[str]:
    raw = vocabulary(llama).with_name("ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8")
    found = raw.split("\n__ggml_vocab_test__\n")
    assert len(found) > 40
    return [*found, "日本語 12345 x = a[0]; <|endoftext|> \t\r\n\n 😀"]


@pytest.fixture(scope="module")
def model(llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    source = vocabulary(llama)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,  # not a multiple of 256: each layer's ffn_down cannot be a K-quant
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bf16(model: Path, llama: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "model-BF16.gguf"
    seen: list[float] = []
    convert(model, out, "tiny", llama, lambda done, text: seen.append(done))
    assert seen[0] == 0.0
    assert seen[-1] == 1.0
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    return out


@pytest.fixture(scope="module")
def q4(bf16: Path, llama: LlamaCpp) -> tuple[Path, QuantReport]:
    out = bf16.with_name("model-Q4_K_M.gguf")
    return out, quantize(bf16, out, "Q4_K_M", llama, quiet)


@pytest.fixture(scope="module")
def server(q4: tuple[Path, QuantReport], llama: LlamaCpp) -> Iterator[Server]:
    with Server(llama, q4[0], ServerOptions(context=256, threads=1)) as running:
        yield running


def by_reader(path: Path) -> Counter[str]:
    from gguf import GGUFReader

    return Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors)


def test_bf16_holds_norms_in_f32_and_the_rest_in_bf16(bf16: Path) -> None:
    found = report(bf16, "BF16")
    assert found.tensors == {"F32": 2 * LAYERS + 1, "BF16": 7 * LAYERS + 1}
    assert 16.0 < found.bits_per_weight < 16.1


def test_q8_0_takes_every_matrix(bf16: Path, llama: LlamaCpp) -> None:
    out = bf16.with_name("model-Q8_0.gguf")
    found = quantize(bf16, out, "Q8_0", llama, quiet)
    assert found.tensors == {"F32": 2 * LAYERS + 1, "Q8_0": 7 * LAYERS + 1} == by_reader(out)
    assert found.fallbacks == 0
    assert 8.5 <= found.bits_per_weight < 8.6
    assert found.bytes == out.stat().st_size


def test_q4_k_m_reports_what_could_not_be_a_k_quant(q4: tuple[Path, QuantReport]) -> None:
    out, found = q4
    assert found.tensors == by_reader(out)
    assert found.fallbacks == LAYERS
    simple = {name: count for name, count in found.tensors.items() if not re.fullmatch(r"Q\d_K|F32", name)}
    assert sum(simple.values()) == LAYERS
    assert found.tensors["Q4_K"] > 0


def test_bf16_is_copied(bf16: Path, llama: LlamaCpp, tmp_path: Path) -> None:
    out = tmp_path / "copy.gguf"
    assert quantize(bf16, out, "BF16", llama, quiet).tensors == report(bf16, "BF16").tensors
    assert out.read_bytes() == bf16.read_bytes()


def test_tokens_are_those_of_transformers(server: Server, model: Path, texts: list[str]) -> None:
    assert verify_tokens(load_tokenizer(model), texts, server) == []


def test_a_changed_tokenizer_is_noticed(server: Server, model: Path, tmp_path: Path) -> None:
    state = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    # under its own class name, transformers would put GPT-2's pre-tokenizer back
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    found = verify_tokens(load_tokenizer(tmp_path), ["no digits", "a 12345"], server)
    assert [difference.text for difference in found] == ["a 12345"]
    assert found[0].transformers != found[0].gguf


def test_the_server_answers_greedily(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy nobody listens at
    talks = [[{"role": "user", "content": text}] for text in ("Hello", "Once upon a time", "12 + 30 =")]
    one_by_one = [server.chat(talk, 8) for talk in talks]
    assert any(one_by_one)
    assert server.chat_many(talks, 8, quiet) == one_by_one


def test_a_prompt_too_long_is_an_error_in_words(server: Server) -> None:
    with pytest.raises(UserError, match="llama-server refused /v1/chat/completions"):
        server.chat([{"role": "user", "content": "word " * 600}], 4)


def test_a_server_without_a_model_ends_with_its_own_words(llama: LlamaCpp, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match="did not come up") as caught, Server(llama, broken, ServerOptions(timeout=60)):
        pass
    assert "failed to load model" in caught.value.what


def test_a_failed_conversion_names_its_log(model: Path, llama: LlamaCpp, tmp_path: Path) -> None:
    folder = tmp_path / "unknown"
    folder.mkdir()
    config = tiny_config("llama") | {"architectures": ["NoSuchForCausalLM"], "rope_parameters": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"converting to GGUF failed .*x\.gguf\.log, ends with:") as caught:
        convert(folder, tmp_path / "x.gguf", "x", llama, quiet)
    assert "NoSuchForCausalLM is not supported" in caught.value.what
    assert (tmp_path / "x.gguf.log").is_file()
    assert not (tmp_path / "x.gguf").exists()


def test_gemma_without_its_tokenizer_model_is_refused(llama: LlamaCpp, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma3_text")))
    with pytest.raises(UserError, match=r"has no tokenizer\.model"):
        convert(tmp_path, tmp_path / "x.gguf", "x", llama, quiet)

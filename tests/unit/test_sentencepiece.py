"""A tokenizer.model rebuilt from tokenizer.json: the same ids, what is wrong caught, what has no equivalent refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.backend import Adapter, LoraWeight
from common.errors import UserError
from common.export.fused_folder import ServingConfig, write_fused
from common.llama_cpp.convertible import check_convertible
from common.models import sentencepiece
from common.models.model_folder import ModelFolder
from common.models.sentencepiece import adapt_space_prefix, check_model, read_state, rebuild, rebuild_checked, write
from common.verify.tiny_models import tiny_config, write_tiny
from tests.tiny_sentencepiece import write_gemma_like, write_llama_like

SHAPES = {
    "gemma": write_gemma_like,
    "llama": write_llama_like,
    "metaspace first": lambda folder: write_llama_like(folder, "first"),
    "metaspace always": lambda folder: write_llama_like(folder, "always"),
    "metaspace never": lambda folder: write_llama_like(folder, "never"),
}
TEXTS = [
    "the cat",
    "hello world",
    "日本語です",
    "x\n\n\n\n\n\n\ny",
    "a      b",
    "é😀\t",
    "what<td>is",
    "return\nreturn",
]
CHAT = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def load(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def processor(model: bytes):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_give_the_same_ids(shape: str, tmp_path: Path) -> None:
    tokenizer = load(SHAPES[shape](tmp_path))
    rebuilt = rebuild_checked(tmp_path, tokenizer, ["<s>the cat[INST] sat <bos>on<start_of_turn>the mat\n"])
    assert rebuilt is not None
    model = processor(rebuilt.model)
    for text in TEXTS:
        assert model.encode(text) == tokenizer.encode(text, add_special_tokens=False), text
        assert model.decode(model.encode(text)) == text
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    assert [model.id_to_piece(i) for i in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )


def test_pieces_have_their_types(tmp_path: Path) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    rebuilt = rebuild_checked(write_gemma_like(tmp_path))
    assert rebuilt is not None
    kinds = {piece.piece: piece.type for piece in ModelProto.FromString(rebuilt.model).pieces}
    of = ModelProto.SentencePiece
    assert {kinds[name] for name in ("<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>")} == {of.CONTROL}
    assert {kinds[name] for name in ("\n", "\n\n\n\n", "<td>")} == {of.USER_DEFINED}
    assert {kinds["▁▁"], kinds["▁▁▁▁"], kinds["the"]} == {of.NORMAL}
    assert (kinds["<unk>"], kinds["<0x0A>"]) == (of.UNKNOWN, of.BYTE)
    assert set(rebuilt.user_defined) == {"\n", "\n\n", "\n\n\n", "\n\n\n\n", "<td>"}


def broken(model: bytes, fault: str) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(model)
    by_name = {piece.piece: piece for piece in proto.pieces}
    if fault == "dropped piece":
        by_name["at"].piece = "never seen"
    elif fault == "swapped scores":
        by_name["he"].score, by_name["en"].score = by_name["en"].score, by_name["he"].score
    elif fault == "space before":
        proto.normalizer_spec.add_dummy_prefix = not proto.normalizer_spec.add_dummy_prefix
    elif fault == "spaces folded":
        proto.normalizer_spec.remove_extra_whitespaces = True
    return proto.SerializeToString()


@pytest.mark.parametrize("fault", ["dropped piece", "swapped scores", "space before", "spaces folded"])
@pytest.mark.parametrize("shape", ["gemma", "llama"])
def test_a_wrong_rebuild_is_caught(shape: str, fault: str, tmp_path: Path) -> None:
    tokenizer = load(SHAPES[shape](tmp_path))
    rebuilt = rebuild_checked(tmp_path, tokenizer)
    assert rebuilt is not None
    check_model(rebuilt.model, tokenizer, TEXTS)
    with pytest.raises(ValueError, match=r"rebuilt, it encodes .* with the ids \.\.\. \["):
        check_model(broken(rebuilt.model, fault), tokenizer, [*TEXTS, "hen at"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update(normalizer={"type": "NFKC"}), r"no equivalent of its \{\"type\": \"NFKC\"\}"),
        (lambda state: state.update(normalizer=None, pre_tokenizer=None), "does not write spaces as ▁"),
        (lambda state: state["model"].update(ignore_merges=True), "sentencepiece has no ignore_merges"),
        (lambda state: state["model"]["vocab"].pop("<0x41>"), r"pieces are not numbered from 0"),
        (lambda state: state["model"]["vocab"].update({"<0x4>": state["model"]["vocab"].pop("<0x41>")}), "<0x41>"),
        (lambda state: state["model"].update(unk_token="<nothing>"), "has no <nothing>"),
    ],
)
def test_what_sentencepiece_cannot_say_is_refused_in_words(change, words: str, tmp_path: Path) -> None:
    state = read_state(write_gemma_like(tmp_path))
    assert state is not None
    change(state)
    with pytest.raises(ValueError, match=words):
        rebuild(state, {"unk": "<unk>"})


def test_a_merge_that_is_missing_shows_in_the_users_rows(tmp_path: Path) -> None:
    path = write_gemma_like(tmp_path) / "tokenizer.json"
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gemma3_text")))
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "".join(merge) != "▁the"]
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"has no tokenizer\.model, and none can be made from its tokenizer\.json"
    ) as caught:
        check_convertible(tmp_path, texts=["in the end"])
    assert "'in the end'" in caught.value.what
    assert "Copy tokenizer.model from the base model" in caught.value.fix


def test_a_byte_level_vocabulary_needs_none(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert rebuild_checked(tmp_path) is None
    write(tmp_path)
    adapt_space_prefix(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def fuse(base: Path, template: str | None) -> Path:
    name = "model.layers.0.self_attn.o_proj"
    from safetensors.numpy import load_file

    rows, columns = load_file(base / "model.safetensors")[f"{name}.weight"].shape
    weight = LoraWeight(np.ones((1, columns), np.float32), np.zeros((rows, 1), np.float32), 1.0)
    out = base.with_name("fused")
    write_fused(
        ModelFolder(base),
        Adapter("x", 1, 0.0, {name: weight}),
        out,
        ServingConfig([1], template),
        lambda share, text: None,
    )
    return out


def test_the_fused_folder_gets_one_and_loads_as_before(tmp_path: Path) -> None:
    base = write_gemma_like(write_tiny(tmp_path / "base", "gemma3_text", {"vocab_size": 600}))
    path = base / "tokenizer_config.json"
    tokens = {t["id"]: {k: v for k, v in t.items() if k != "id"} for t in (read_state(base) or {})["added_tokens"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": tokens}))  # as transformers 4
    out = fuse(base, None)
    before, after = load(base), load(out)
    check_model((out / "tokenizer.model").read_bytes(), after, TEXTS)
    for text in [*TEXTS, "<start_of_turn>user\n\n\nHi<end_of_turn>", "a" + " " * 9 + "b"]:
        assert after.encode(text) == before.encode(text)
    decoder = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    assert {token["content"] for token in tokens.values()} - {token["content"] for token in decoder.values()} == {
        "▁▁",
        "▁▁▁",
        "▁▁▁▁",
    }
    assert not (base / "tokenizer.model").exists()


def test_a_fused_folder_without_one_is_whole_all_the_same(tmp_path: Path) -> None:
    base = write_gemma_like(write_tiny(tmp_path / "base", "gemma3_text", {"vocab_size": 600}))
    path = base / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"normalizer": {"type": "NFKC"}}))
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    out = fuse(base, None)
    assert (out / "model.safetensors").is_file()
    assert not (out / "tokenizer.model").exists()
    with pytest.raises(UserError, match="no equivalent of its"):
        check_convertible(base)


@pytest.mark.parametrize(
    ("scheme", "template", "settled"),
    [("first", CHAT, True), ("first", CHAT.replace("{{ bos_token }}", "Q: "), False), ("always", CHAT, False)],
)
def test_a_space_that_no_chat_had_is_not_served(scheme: str, template: str, settled: bool, tmp_path: Path) -> None:
    base = write_llama_like(write_tiny(tmp_path / "base", "llama", {"vocab_size": 600}), scheme)
    out = fuse(base, template)
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config.get("add_prefix_space") is (False if settled else None)
    before, after = load(base), load(out)
    chat = "<s>[INST] the cat [/INST]sat</s>"
    assert after.encode(chat) == before.encode(chat)
    assert (after.encode("the cat") == before.encode("the cat")) is not settled
    check_model((out / "tokenizer.model").read_bytes(), after, [chat])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    write_llama_like(write_tiny(tmp_path, "llama", {"vocab_size": 600}), "first")
    tokenizer = load(tmp_path)
    tokenizer.chat_template = CHAT
    (tmp_path / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:  # the library's own message is another matter
        patch.setattr(sentencepiece, "open_tokenizer", lambda folder: tokenizer)
        for change in (write, adapt_space_prefix):
            with pytest.raises(UserError, match=f"{name} is not"):
                change(tmp_path)


def test_a_vocabulary_that_sentencepiece_refuses(tmp_path: Path) -> None:
    folder = write_gemma_like(tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"<td>"', '"<t\\u0000d>"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json: sentencepiece refuses it: "):
        rebuild_checked(folder)

"""A multimodal model's two GGUFs: the language model, and the vision tower for `--mmproj`."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.llama_cpp.build import ensure
from common.llama_cpp.convert import convert
from common.llama_cpp.mmproj import vision_fault, write_mmproj
from common.models.model_folder import ModelFolder
from tests.progress import silent
from tests.tiny import write_family, write_model

SETTINGS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "image_seq_length": 4}


def write_sentencepiece(path):
    """Three control pieces and the 256 bytes: as many as the tiny models' vocabulary."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.model_type = 2  # BPE
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3)] + [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    for number, (text, kind) in enumerate(kinds):
        model.pieces.add(piece=text, score=-number, type=kind)
    path.write_bytes(model.SerializeToString())


def tensors(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def fields(path):
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if "vision" in name}


@pytest.mark.parametrize("layout", ["today", "4.52"])
def test_a_multimodal_model_becomes_two_files(tmp_path, layout):
    folder = write_family(tmp_path / "model", "gemma3", older=layout == "4.52")
    assert ModelFolder(folder).has_vision
    assert vision_fault(folder) == "no preprocessor_config.json with image_mean and image_std"
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    assert vision_fault(folder) == ""
    write_sentencepiece(folder / "tokenizer.model")
    llama = ensure(None, silent)
    convert(folder, tmp_path / "gguf" / "model-BF16.gguf", "tiny", llama, silent)
    write_mmproj(folder, tmp_path / "gguf" / "mmproj-BF16.gguf", "tiny", llama, silent)
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["mmproj-BF16.gguf", "model-BF16.gguf"]

    text, tower = (tensors(tmp_path / "gguf" / f"{name}-BF16.gguf") for name in ("model", "mmproj"))
    assert all(name.startswith(("blk.", "token_embd.", "output_norm.")) for name in text), sorted(text)
    assert all(name.startswith(("v.", "mm.")) for name in tower), sorted(tower)
    stored = load_file(folder / "model.safetensors")
    # SigLIP's pooling head is not a part of Gemma's tower
    kept = [n for n in stored if ("vision_tower" in n or "multi_modal" in n) and ".head." not in n]
    assert len(tower) == len(kept)
    by_name = {name.rsplit("vision_tower.", 1)[-1]: tensor for name, tensor in stored.items()}
    np.testing.assert_array_equal(tower["v.patch_embd.weight"], by_name["embeddings.patch_embedding.weight"])
    found = by_name["encoder.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(tower["v.blk.0.attn_q.weight"], found, rtol=2**-8)
    known = fields(tmp_path / "gguf" / "mmproj-BF16.gguf")
    np.testing.assert_allclose(known["clip.vision.image_mean"], SETTINGS["image_mean"])
    assert known["clip.vision.projection_dim"] == text["output_norm.weight"].size


def test_pixtrals_tower_has_an_embedding_of_the_language_model(tmp_path):
    folder = write_family(tmp_path / "model", "mistral3")
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = tokenizer["added_tokens"][2]
    token["content"] = "[IMG_BREAK]"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_mmproj(folder, tmp_path / "gguf" / "mmproj-BF16.gguf", "tiny", ensure(None, silent), silent)

    tower, stored = tensors(tmp_path / "gguf" / "mmproj-BF16.gguf"), load_file(folder / "model.safetensors")
    kept = [name for name in stored if name.startswith(("vision_tower.", "multi_modal_projector."))]
    assert len(tower) == len(kept) + 1
    embeddings = stored["language_model.model.embed_tokens.weight"]
    np.testing.assert_allclose(tower["v.token_embd.img_break"], embeddings[token["id"]], rtol=2**-8)
    found = stored["vision_tower.transformer.layers.0.attention.v_proj.weight"]
    np.testing.assert_allclose(tower["v.blk.0.attn_v.weight"], found, rtol=2**-8)


def gemma_4_tower(tmp_path, family):
    """The tensors of the tower's GGUF, and those of the model: as many as are not of the language model."""
    folder, out = write_family(tmp_path / "model", family), tmp_path / "gguf" / "mmproj-BF16.gguf"
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    write_mmproj(folder, out, "tiny", ensure(None, silent), silent)
    tower, stored = tensors(out), load_file(folder / "model.safetensors")
    assert len(tower) == sum(not name.startswith("model.language_model.") for name in stored)
    return tower, stored


def test_gemma_4s_towers_for_images_and_sound_are_in_one_file(tmp_path):
    tower, stored = gemma_4_tower(tmp_path, "gemma4")
    found = stored["model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"]
    np.testing.assert_allclose(tower["v.blk.0.attn_q.weight"], found, rtol=2**-8)
    found = stored["model.embed_audio.embedding_projection.weight"]
    np.testing.assert_allclose(tower["mm.a.input_projection.weight"], found, rtol=2**-8)


def test_the_embedders_of_gemma_4_12b_are_in_one_file(tmp_path):
    """It has no towers: pixels and samples are embedded as they are. The file's pixels are in another order."""
    tower, stored = gemma_4_tower(tmp_path, "gemma4_unified")
    assert len(tower) == 11
    found = stored["model.embed_vision.embedding_projection.weight"]
    np.testing.assert_allclose(tower["mm.input_projection.weight"], found, rtol=2**-8)
    found = stored["model.vision_embedder.patch_dense.weight"].reshape(48, 24 * 24, 3).swapaxes(1, 2).reshape(48, -1)
    (name,) = (name for name, tensor in tower.items() if tensor.size == found.size)
    np.testing.assert_allclose(tower[name].reshape(48, -1), found, rtol=2**-8)


def test_a_model_of_text_has_no_vision(tmp_path):
    assert not ModelFolder(write_model(tmp_path / "model")).has_vision

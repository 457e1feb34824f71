"""Tiny random models with a real byte-level tokenizer and a chat template, made in a second."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from common.models import granite4, lfm2
from common.models.family_defaults import DEFAULTS
from common.verify.tiny_models import TINY, tiny_config, write_tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 3, 3]}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Multimodal models, and the family of their text part.
MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "ministral3",
    "qwen2_5_vl": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_vl": "qwen3",
}
FAMILIES = (*TINY, *MULTIMODAL)


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE without merges: 256 bytes and three special tokens. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        additional_special_tokens=SPECIAL,
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_model(folder: Path, seed: int = 0, tied: bool = True) -> Path:
    """A plain float32 Llama with a tokenizer; under 1 MB."""
    plain = {
        "tie_word_embeddings": tied,
        "mlp_bias": False,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0},
    }
    write_tiny(folder, "llama", plain, seed)
    assert write_tokenizer(folder) == 259
    return folder


def write_convertible(folder: Path, vocabulary: Path) -> None:
    """A bf16 Mistral that llama.cpp takes, since its vocabulary is one of llama.cpp's own."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_family(folder: Path, family: str, older: bool = False) -> Path:
    """A float32 model of `family` with a tokenizer, as transformers saves it today or as older releases did."""
    if family in MULTIMODAL:
        _write_multimodal(folder, family)
    else:
        write_tiny(folder, family)
    assert write_tokenizer(folder) == 259
    if older:
        _age(folder, family)
    return folder


def _write_multimodal(folder: Path, family: str) -> None:
    """The tiny model of the family as the text part of one with a vision tower, by transformers."""
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    changes = {"rope_parameters": _MROPE, "use_sliding_window": False} if family.startswith("qwen") else {}
    if family == "qwen3_5":
        half = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
        changes = {"rope_parameters": _MROPE | half}
    text = tiny_config(MULTIMODAL[family], changes)
    write_tiny(folder, MULTIMODAL[family], changes)
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    if family.startswith("qwen"):
        text = {name: value for name, value in text.items() if name not in ("model_type", "architectures")}
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
        more = tied
    elif family == "gemma4":
        tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        vision = tower | {"head_dim": 16, "intermediate_size": 48, "patch_size": 8, "position_embedding_size": 16}
        audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 48}
        more = {"audio_config": audio, "image_token_id": 258, "audio_token_id": 257, "video_token_id": 256}
    elif family == "gemma4_unified":  # no towers: an image's pixels and a sound's samples are embedded as they are
        vision = {"mm_embed_dim": 48, "mm_posemb_size": 16, "output_proj_dims": 48, "patch_size": 8}
        audio = {"audio_embed_dim": 64, "output_proj_dims": 64}
        more = {"audio_config": audio, "image_token_id": 258, "audio_token_id": 257, "video_token_id": 256}
    else:
        vision = {
            "model_type": "siglip_vision_model" if family == "gemma3" else "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,  # llama.cpp names the projector's matrices by a layer's number
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        more = {"image_token_index": 258} | ({"mm_tokens_per_image": 4} if family == "gemma3" else tied)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
    tensors = load_file(folder / "model.safetensors")
    body = {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}
    model.model.language_model.load_state_dict(body)
    if "lm_head.weight" in tensors:
        model.lm_head.weight.data = tensors["lm_head.weight"]
    model.save_pretrained(folder)
    if family == "qwen3_5":  # the hub's have a layer that predicts a token more, and no part in training
        tensors = load_file(folder / "model.safetensors")
        tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(128, 64)
        save_torch(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = {
        "mistral3": "Pixtral",
        "gemma3": "Gemma3",
        "gemma4": "Gemma4",
        "gemma4_unified": "Gemma4Unified",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_5": "Qwen3VL",
        "qwen3_vl": "Qwen3VL",
    }
    kind = kinds[family]
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": f"{kind}Processor"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor"}))


def _age(folder: Path, family: str) -> None:
    """Rewrite a folder as transformers 4 saved it, where the hub's models come from: config keys and tensor names."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    kind = MULTIMODAL.get(family, text["model_type"])
    rope = text.pop("rope_parameters")
    if kind.startswith("gemma4"):
        text["rope_parameters"] = rope
        _as_on_the_hub(folder, text)
        path.write_text(json.dumps(config))
        return
    if "full_attention" in rope:
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    text["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if kind == "phi3":  # it stands in the config itself
        del rope["original_max_position_embeddings"]
    scaling = rope.pop("rope_type")
    key = "type" if scaling in ("longrope", "yarn") else "rope_type"  # renamed in 4.43
    text["rope_scaling"] = None if scaling == "default" else {key: scaling, **rope}
    if "mrope_section" in rope:
        text["rope_scaling"] = {"type": "mrope"} | {key: rope[key] for key in rope if key.startswith("mrope")}
    config["torch_dtype"] = config.pop("dtype")
    text.pop("dtype", None)
    if kind == "gemma3_text":
        text["sliding_window_pattern"] = text["layer_types"].index("full_attention") + 1
    if kind == lfm2.KIND:
        kinds = text["layer_types"]
        text["full_attn_idxs"] = [layer for layer, one in enumerate(kinds) if one == "full_attention"]
        text["block_ff_dim"], text["tie_embedding"] = text.pop("intermediate_size"), text.pop("tie_word_embeddings")
    for key in ("layer_types", "no_rope_layers", "_sliding_window_pattern"):  # what earlier releases did not write
        text.pop(key, None)
    if kind == granite4.KIND:  # layers of attention had another name
        text["layer_types"] = ["attention"] * text["num_hidden_layers"]
    for key, value in DEFAULTS[kind].items():  # what no release writes where it wrote differences alone
        if key in text and text[key] == value:
            del text[key]
    if text.get("head_dim") == text["hidden_size"] // text["num_attention_heads"] and kind in ("llama", "mistral"):
        del text["head_dim"]
    if family == "qwen2_5_vl":  # until 4.52 the text part's settings stood beside the vision tower's
        config = {**config.pop("text_config"), **config}
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if family == "qwen2_5_vl":
        renamed = {"model.language_model.": "model.", "model.visual.": "visual."}
        for new, old in renamed.items():
            tensors = {old + n.removeprefix(new) if n.startswith(new) else n: t for n, t in tensors.items()}
    if family == "gemma3":  # transformers 4.52 saved its modules' own names; before and after, the first release's
        tensors = {f"model.{n.replace('language_model.model.', 'language_model.')}": t for n, t in tensors.items()}
    if family == "llama":  # until 4.32 its frequencies were saved with it
        for layer in range(text["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    if family == "qwen3":  # tied, and saved all the same
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _as_on_the_hub(folder: Path, text: dict) -> None:
    """Rewrite a Gemma 4: its config names heads by kind of layer, and layers that share keys have weights for some."""
    layers = list(text.pop("per_layer_config").values())
    text["global_head_dim"] = layers[0]["head_dim"]
    text["num_global_key_value_heads"] = layers[0].get("num_key_value_heads")
    tensors = load_file(folder / "model.safetensors")
    start = "model.language_model." if any("language_model" in name for name in tensors) else "model."
    count, shared = text["num_hidden_layers"], text.get("num_kv_shared_layers", 0)
    random = np.random.default_rng(5)
    for layer in range(count - shared, count):
        width = text["head_dim"] if text["layer_types"][layer] == "sliding_attention" else text["global_head_dim"]
        shape = (text["num_key_value_heads"] * width, text["hidden_size"])
        at = f"{start}layers.{layer}.self_attn"
        tensors |= {f"{at}.{name}_proj.weight": random.normal(0, 1, shape).astype(np.float32) for name in "kv"}
        tensors[f"{at}.k_norm.weight"] = random.normal(0, 1, width).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def chat(user: str, assistant: str, system: str | None = None) -> dict:
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def write_rows(path: Path, count: int = 24, longest: int = 0) -> Path:
    """Chat rows of different lengths, about 50 tokens and up to `longest` more."""
    more = [" and so on" * (i * longest // count // 10) for i in range(count)]
    rows = [chat(f"Say {'x' * (i % 7)} number {i}", f"Number {i} it is{more[i]}{'!' * (i % 5)}") for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

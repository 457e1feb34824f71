"""Model folders and programs of a stranger: whatever runs code of theirs leaves a marker file."""

import json
import sys
from pathlib import Path

from common.llama_cpp.install import CONVERTER, OURS, TARGETS
from tests.tiny import CHATML, write_family

# The one class that llama.cpp's converter for Llama and Mistral loads with trust_remote_code=True.
DNA = "HybridDNATokenizer"


def _code(marker: Path) -> str:
    text = f"from pathlib import Path\nPath({str(marker)!r}).open('a').write(__file__ + '\\n')\n"
    return text + f"class {DNA}:\n    from_pretrained = classmethod(lambda cls, *a, **k: cls())\n    vocab_size = 0\n"


def trap_model(folder: Path, marker: Path, vocabulary: Path | None = None, tokenizer_class: str = "") -> Path:
    """A tiny model that names its own code wherever transformers looks for it, and brings it as a license file.

    vocabulary: one of llama.cpp's, with which a Mistral can become a GGUF. Without one it is a Llama, of which
    transformers asks whether to run the code, and tokenizer_config.json names no class, or `tokenizer_class`.
    """
    if vocabulary is None:
        write_family(folder, "llama")
    else:
        _mistral(folder, vocabulary)
    for name in ("LICENSE.py", "evil.py", "NOTICE.py"):
        (folder / name).write_text(_code(marker))
    (folder / "LICENSE").write_text("MIT License")
    (folder / "notes.md").write_text("nobody reads this")
    names = {"AutoTokenizer": [f"LICENSE.{DNA}", None], "AutoConfig": f"evil.{DNA}"}
    names |= {"AutoModelForCausalLM": f"evil.{DNA}", "AutoProcessor": f"evil.{DNA}"}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        if name == "tokenizer_config.json" and (tokenizer_class or vocabulary is None):
            content.pop("tokenizer_class", None)
            content |= {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
        path.write_text(json.dumps(content | {"auto_map": names}))
    return folder


def _mistral(folder: Path, vocabulary: Path) -> None:
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


def trap_llama_cpp(folder: Path, marker: Path) -> Path:
    """A folder with a script in place of each program of llama.cpp."""
    folder.mkdir()
    for name in (CONVERTER, *TARGETS, *OURS):
        (folder / name).write_text(f"#!{sys.executable}\nopen({str(marker)!r}, 'a').write(__file__)\n")
        (folder / name).chmod(0o755)
    return folder

"""Model and run folders of a stranger: whatever runs code of theirs leaves a marker file."""

import json
from pathlib import Path

from tests.tiny import write_family

# The one class that llama.cpp's converter for Llama and Mistral loads with trust_remote_code=True.
DNA = "HybridDNATokenizer"


def _code(marker: Path) -> str:
    text = f"from pathlib import Path\nPath({str(marker)!r}).open('a').write(__file__ + '\\n')\n"
    return text + f"class {DNA}:\n    from_pretrained = classmethod(lambda cls, *a, **k: cls())\n    vocab_size = 0\n"


def trap_model(folder: Path, marker: Path, tokenizer_class: str | None = None) -> Path:
    """A tiny Mistral that names its own code wherever transformers looks for it, and brings it as a license file."""
    write_family(folder, "mistral")
    for name in ("LICENSE.py", "evil.py", "NOTICE.py"):
        (folder / name).write_text(_code(marker))
    (folder / "LICENSE").write_text("MIT License")
    (folder / "notes.md").write_text("nobody reads this")
    names = {"AutoTokenizer": [f"LICENSE.{DNA}", None], "AutoConfig": f"evil.{DNA}"}
    names |= {"AutoModelForCausalLM": f"evil.{DNA}", "AutoProcessor": f"evil.{DNA}"}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        if tokenizer_class and name == "tokenizer_config.json":
            content["tokenizer_class"] = tokenizer_class
        path.write_text(json.dumps(content | {"auto_map": names}))
    return folder

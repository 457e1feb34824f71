"""What a stranger may hand over: models, adapters, rows, runs. Whatever runs code of theirs leaves a marker file."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.llama_cpp.install import CONVERTER, OURS, TARGETS
from tests.tiny import CHATML, chat, write_convertible, write_family

# The one class that llama.cpp's converter for Llama and Mistral loads with trust_remote_code=True.
DNA = "HybridDNATokenizer"


# A name for every kind of thing; a shell that reads it makes `marker` in its working folder.
SHELL = "x;touch marker;$(touch marker)`touch marker`'\"&|"
# Names under which Python, or a library, looks for code in a folder that it is pointed at or started in.
_MODULES = ("sitecustomize", "numpy", "torch", "gguf", "pip", "mlx_lm", "transformers", "safetensors", "conftest")
_MODULES += ("modeling_llama", "configuration_llama", "tokenization_llama", "data", "model", "adapter", "generate")
_PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng.pkl")
_PROGRAMS = ("llama-server", "llama-quantize", "cmake", "git", "ninja", "pip", "sh")


# A regular expression that no machine finishes on the name of a layer.
ENDLESS = "([a-z_.0-9]|[a-z])*[A-Z]"


class _Pickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo pickle >> {self.marker}",)


def trap_folder(folder: Path, marker: Path) -> Path:
    """Lay into any folder what loaders, imports and program searches may fall for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _MODULES:
        (folder / f"{name}.py").write_text(_code(marker))
    for name in _PICKLES:
        (folder / name).write_bytes(pickle.dumps(_Pickled(marker)))
    for name in _PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho program >> {marker}\n")
        (folder / name).chmod(0o755)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(_code(marker))
    return folder


def trap_template(marker: Path) -> str:
    """A chat template that leaves every sandbox there is a hole in, and is ChatML otherwise."""
    command = json.dumps(f"echo template >> {marker}")
    ways = (
        *("lipsum.__globals__", "cycler.__init__.__globals__", "joiner.__init__.__globals__"),
        *("namespace.__init__.__globals__", "raise_exception.__globals__", "strftime_now.__globals__"),
        *("self.__init__.__globals__", "messages.__class__.__init__.__globals__"),
    )
    parts = []
    for way in ways:  # each step is asked for before the next is taken: a sandbox says that there is none
        steps = [*way.split("."), "os"]
        there = " and ".join(f"{'.'.join(steps[: count + 1])} is defined" for count in range(len(steps)))
        parts.append(f"{{% if {there} %}}{{{{ {way}.os.system({command}) }}}}{{% endif %}}")
    return "".join(parts) + CHATML


def trap_yaml(marker: Path) -> str:
    return f"!!python/object/apply:os.system ['echo yaml >> {marker}']\n"


def trap_rows(folder: Path, marker: Path, template: str) -> Path:
    """Rows that are templates and shell words, as JSONL and as Parquet with a pickled column type."""
    trap_folder(folder, marker)
    text = template.removesuffix(CHATML)  # whose ends of turns no row may hold
    rows = [chat(f"{SHELL} {number}", text, SHELL) for number in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = {"ARROW:extension:name": "arrow.py_extension_type"}
    kind["ARROW:extension:metadata"] = pickle.dumps(_Pickled(marker), protocol=0).decode()
    column = pa.field("output", pa.string(), metadata=kind)
    table = pa.table([["a", "b"], ["c", "d"]], schema=pa.schema([pa.field("instruction", pa.string()), column]))
    pq.write_table(table, folder.parent / "rows.parquet")
    return folder


def trap_adapter(folder: Path, marker: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """PEFT's layout, which names a module to import and patterns that take forever."""
    from safetensors.numpy import save_file

    trap_folder(folder, marker)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.zeros((2, in_features), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((out_features, 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": SHELL}
    config |= {"auto_mapping": {"base_model_class": "Evil", "parent_library": "torch"}, "revision": SHELL}
    config |= {"target_modules": ENDLESS, "rank_pattern": {ENDLESS: 8}}
    config["auto_map"] = {"AutoModel": f"evil.{DNA}"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


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
        write_convertible(folder, vocabulary)
    trap_folder(folder, marker)
    for name in ("LICENSE.py", "evil.py", "NOTICE.py"):
        (folder / name).write_text(_code(marker))
    (folder / "quantized_source.json").write_text(json.dumps({"path": SHELL, "scheme": "mlx-4bit-64"}))
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
        more = {"model_file": "evil.py"} if name == "config.json" else {}  # mlx-lm's name for it
        path.write_text(json.dumps(content | {"auto_map": names} | more))
    return folder


def trap_llama_cpp(folder: Path, marker: Path) -> Path:
    """A folder with a script in place of each program of llama.cpp."""
    folder.mkdir()
    for name in (CONVERTER, *TARGETS, *OURS):
        (folder / name).write_text(f"#!{sys.executable}\nopen({str(marker)!r}, 'a').write(__file__)\n")
        (folder / name).chmod(0o755)
    return folder

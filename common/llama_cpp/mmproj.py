"""A multimodal model's vision tower as a GGUF of its own, which llama.cpp loads beside the model with `--mmproj`."""

import json
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.documents import read_json
from common.files import scratch_folder
from common.llama_cpp.convert import convert
from common.llama_cpp.install import LlamaCpp
from common.model_files import TOKENIZER_FILES
from common.models.families import VISION_PARTS, hf_name
from common.models.model_folder import CONFIG_FILE, ModelFolder
from common.models.safetensors_files import Header, copy_bytes

_SETTINGS = ("preprocessor_config.json", "processor_config.json")


def vision_fault(folder: Path) -> str:
    """What the folder lacks for llama.cpp's converter to write the vision tower, or ""."""
    found: dict[str, Any] = {}
    for name in _SETTINGS:
        if (folder / name).is_file():
            content = read_json(folder / name, "Fetch the model's files again.")
            found |= content | content.get("image_processor", {})
    missing = [key for key in ("image_mean", "image_std") if not found.get(key)]
    return f"no preprocessor_config.json with {' and '.join(missing)}" if missing else ""


def write_mmproj(folder: Path, out: Path, name: str, llama: LlamaCpp, progress: Progress) -> None:
    """Write the vision tower and its projector in bf16, by llama.cpp's converter.

    The converter knows the hub's tensor names only. It fails on those that transformers 4.52 saves, and silently skips
    those that transformers 5 saves. So it gets these tensors in a folder of their own, under the hub's names.
    """
    model = ModelFolder(folder)
    kind = "gemma4" if model.model_type.startswith("gemma4") else ""
    if (model.written_config.get("vision_config") or {}).get("model_type") == "pixtral":
        kind = "pixtral"
    with scratch_folder(out.parent) as alone:
        for file in (CONFIG_FILE, *_SETTINGS, *(TOKENIZER_FILES if kind == "pixtral" else ())):
            if (folder / file).is_file():
                (alone / file).write_bytes((folder / file).read_bytes())
        for shard in model.shards:
            _copy_vision(shard, model.header(shard), alone / shard.name, kind)
        convert(alone, out, name, llama, progress, "mmproj")


def _hub_name(name: str, kind: str) -> str:
    """The hub's name of a tensor of the vision tower; "" for any other. kind: gemma4, pixtral or "" for others.

    Gemma 4 has a tower for sound too, which goes into the same file. Of Pixtral's also the embeddings: the one of
    [IMG_BREAK] becomes a part of the tower's file. The converter of llama.cpp 0.3.36 drops them where they have the
    hub's name.
    """
    name = hf_name(name).removeprefix("model.")
    if kind == "pixtral" and name == "language_model.embed_tokens.weight":
        return "model.embed_tokens.weight"
    if not name.startswith(VISION_PARTS):
        return ""
    if kind == "gemma4":
        return f"model.{name}"
    older = kind == "pixtral" or ".vision_model." in name
    return name if older else name.replace("vision_tower.", "vision_tower.vision_model.")


def _copy_vision(shard: Path, given: Header, out: Path, kind: str) -> None:
    """Copy the shard's tensors that `_hub_name` names, their bytes unchanged; no file where it has none."""
    entries, start = given
    header: dict[str, Any] = {}
    chosen, end = [], 0
    for name, entry in entries.items():
        if hub := _hub_name(name, kind):
            first, last = entry["data_offsets"]
            header[hub] = entry | {"data_offsets": [end, end + last - first]}
            chosen.append((start + first, last - first))
            end += last - first
    if not chosen:
        return
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with shard.open("rb") as source, out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for first, size in chosen:
            source.seek(first)
            copy_bytes(source, file, size)

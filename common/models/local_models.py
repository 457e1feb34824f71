"""The models that lie on this machine and could be trained: in the hub's cache, Ollama, LM Studio, the current folder.

They are strangers' files: names, JSON within bounds and headers are read of them, and what is damaged is left out.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.models.families import is_known
from common.models.gguf_import import gguf_pre_tokenizer, is_gguf
from common.models.model_folder import ModelFolder, is_model_folder
from common.models.resolve import check_folder, header_faults, is_complete
from common.models.shapes import tensor_shapes
from common.paths import user_path
from common.presets import published_configs

HUB = "the hub"
_MOST = 500  # entries of a place that are looked at
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")  # where its Linux service keeps them
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PART = re.compile(r"mmproj.*|.*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)  # no model by itself


@dataclass(frozen=True)
class LocalModel:
    model: str  # what --model takes
    name: str  # as its owner knows it
    where: str
    size: int  # bytes of its weights
    config: dict[str, Any] | None = None  # the language model's; None where it is not known, as of a GGUF

    @property
    def is_here(self) -> bool:
        return self.where != HUB


def local_models(home: Path, here: Path) -> list[LocalModel]:
    """Those of supported families, as far as that can be seen without reading weights; each once."""
    found = [*_of_hub_cache(), *_of_ollama(home), *_of_lm_studio(home), *_of_folder(here)]
    shown = [one for one in found if (one.name + one.model).isprintable()]
    return list({os.path.realpath(one.model) if Path(one.model).exists() else one.model: one for one in shown}.values())


def _of_hub_cache() -> Iterator[LocalModel]:
    from huggingface_hub import constants

    for folder in _entries(Path(constants.HF_HUB_CACHE), "models--*"):
        name = folder.name.removeprefix("models--").replace("--", "/")
        revision = _text(folder / "refs" / "main")
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            yield from _folder(folder / "snapshots" / revision, name, name, "the hub's cache")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _of_ollama(home: Path) -> Iterator[LocalModel]:
    given = os.environ.get("OLLAMA_MODELS")
    for root in [Path(given)] if given else [home / ".ollama" / "models", _OLLAMA_SERVICE]:
        manifests = root / "manifests"
        for manifest in _entries(manifests, "*/*/*/*"):
            if digest := _ollama_digest(manifest):
                registry, owner, name, tag = manifest.relative_to(manifests).parts
                place = "/".join(part for part in (registry, owner) if part not in ("registry.ollama.ai", "library"))
                full = f"{place}/{name}:{tag}" if place else f"{name}:{tag}"
                yield from _gguf(root / "blobs" / f"sha256-{digest}", full, "Ollama")


def _ollama_digest(manifest: Path) -> str:
    """Of the layer with the weights; empty where the manifest names none."""
    try:
        layers = read_json(manifest, "").get("layers")
    except (UserError, OSError):
        return ""
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == _OLLAMA_MODEL:
            digest = _DIGEST.fullmatch(str(layer.get("digest")))
            return digest[1] if digest else ""
    return ""


def lm_studio_folders(home: Path) -> list[Path]:
    """Where LM Studio keeps models: today's folder, and that of its older versions."""
    return [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]


def _of_lm_studio(home: Path) -> Iterator[LocalModel]:
    for root in lm_studio_folders(home):
        for folder in _entries(root, "*/*"):
            name = "/".join(folder.relative_to(root).parts)
            yield from _folder(folder, str(folder), name, "LM Studio")
            for path in _entries(folder, "*.gguf"):
                yield from _gguf(path, f"{name}/{path.name}", "LM Studio")


def _of_folder(here: Path) -> Iterator[LocalModel]:
    for path in _entries(here, "*.gguf"):
        yield from _gguf(path, path.name, "this folder", path.name)
    for folder in _entries(here, "*"):
        yield from _folder(folder, f"./{folder.name}", folder.name, "this folder")


def _entries(folder: Path, pattern: str) -> Iterable[Path]:
    try:
        return sorted(islice(folder.glob(pattern), _MOST))
    except OSError:
        return []


def _gguf(path: Path, name: str, where: str, model: str = "") -> Iterator[LocalModel]:
    if not _PART.fullmatch(path.name) and path.is_file() and is_gguf(path):
        yield LocalModel(model or str(path), name, where, path.stat().st_size)


def _folder(folder: Path, model: str, name: str, where: str) -> Iterator[LocalModel]:
    if not is_model_folder(folder):
        return
    found = ModelFolder(folder)
    try:
        if is_complete(found) and is_known(found.config) and not header_faults(found):
            yield LocalModel(model, name, where, found.weight_bytes, found.config | {"dtype": found.dtype})
    except (UserError, OSError):
        return


def published_model(name: str, config: dict[str, Any] | None) -> LocalModel:
    """A model of the hub, by what is known of it without asking there; its weights are stored in 16 bits."""
    size = 2 * sum(map(prod, tensor_shapes(config).values())) if config else 0
    return LocalModel(name, name, HUB, size, config)


def named_model(text: str, known: Iterable[LocalModel]) -> LocalModel:
    """The model that was typed: one of `known` by its name, a folder, a GGUF, or a name on the hub.

    Raises UserError where it cannot be trained, as far as that is seen without reading weights.
    """
    found = next((one for one in known if text in (one.model, one.name)), None)
    path = user_path(found.model if found else text, "--model")
    if found is None and path.is_dir():
        found = next(_folder(path, text, path.resolve().name, "this machine"), None)
        if found is None:
            check_folder(ModelFolder(path), text)
            raise UserError(f"--model {text}: it is not complete, or not supported.", "Give another model.")
    if path.is_file():
        gguf_pre_tokenizer(path)
        return found or LocalModel(text, path.stem, "this machine", path.stat().st_size)
    if found is None and (text.startswith((".", "/", "~")) or text.count("/") != 1):
        raise UserError(
            f"--model {text}: no such model is here.", "Give a folder, a GGUF file, or a hub name like owner/name."
        )
    return found or published_model(text, published_configs().get(text))

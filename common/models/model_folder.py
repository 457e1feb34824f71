"""A model's folder: what its config and the headers of its weights say. Nobody else opens config.json."""

import hashlib
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from common.backend import Progress
from common.documents import read_json
from common.errors import UserError
from common.model_files import read_config, shard_files
from common.models.config_faults import config_faults
from common.models.config_kinds import generation_faults, kind_faults
from common.models.families import VISION_PARTS, hf_name, normalize_config, text_config, text_name
from common.models.hash_memory import remember, remembered, stamps
from common.models.safetensors_files import DTYPES, Header, StoredTensor, read_header, stored_tensors

CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_REMEDY = "Fetch the model's files again."
# Facts about the files and not about the model: they do not enter the hash.
_VOLATILE = {"transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "use_cache"}
_HASHING = 1  # the version of the hash of contents; raised where the same files come to have another one


def is_model_folder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


class ModelFolder:
    """The Hugging Face folder `path`. Each file is read when something of it is first needed, and then once.

    A property raises UserError where a file that it needs is missing or damaged. The dicts are shared: do not change
    them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: dict[Path, Header] = {}
        self._content_hash = ""

    @cached_property
    def written_config(self) -> dict[str, Any]:
        """config.json as it is in the file; a stranger's may name code. What readers look at is of the right kind."""
        try:
            config = read_json(self.path / CONFIG_FILE, _REMEDY)
        except FileNotFoundError:
            raise UserError(f"{self.path} has no {CONFIG_FILE}.", "Give a complete model folder.") from None
        self._check(CONFIG_FILE, kind_faults(config))
        return config

    @cached_property
    def config(self) -> dict[str, Any]:
        """The language model's config, normalized: every fact is explicit (`families.text_config`).

        Raises UserError where it is not of a supported family, or lacks what a forward pass needs.
        """
        if faults := config_faults(self.written_config):
            raise UserError(f"{self.path}: {'; '.join(faults)}", _REMEDY)
        return text_config(self.written_config)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json without the keys that name code; empty where there is none."""
        path = self.path / "generation_config.json"
        config = read_config(path) if path.exists() else {}
        self._check(path.name, generation_faults(config))
        return config

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer, as generation_config.json has them."""
        known = self.generation_config.get("eos_token_id")
        return [known] if isinstance(known, int) else known or []

    def _check(self, name: str, faults: list[str]) -> None:
        if faults:
            raise UserError(f"{self.path / name} holds what it should not: {'; '.join(faults[:3])}.", _REMEDY)

    @property
    def model_type(self) -> str:
        """As the config names it: of a multimodal model, the name of all of it."""
        return str(self.written_config.get("model_type", ""))

    @property
    def vocabulary_size(self) -> int:
        return int(self.config["vocab_size"])

    @cached_property
    def shards(self) -> list[Path]:
        """The safetensors files, in name order."""
        return shard_files(self.path)

    def header(self, shard: Path) -> Header:
        if shard not in self._headers:
            self._headers[shard] = read_header(shard)
        return self._headers[shard]

    def tensors_of(self, shard: Path) -> dict[str, StoredTensor]:
        """The shard's tensors by the names in the file."""
        return stored_tensors(shard, self.header(shard))

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All stored tensors by the names in the files, shard after shard."""
        return {name: tensor for shard in self.shards for name, tensor in self.tensors_of(shard).items()}

    @property
    def full_names(self) -> dict[str, str]:
        """Names within the language model alone -> today's names in the complete model."""
        return {text_name(name): hf_name(name) for name in self.tensors}

    @cached_property
    def dtype(self) -> str:
        """The type that most of the weights' bytes are in: "bfloat16", "float16" or "float32"."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.size
        return {"BF16": "bfloat16", "F16": "float16"}.get(sizes.most_common(1)[0][0], "float32")

    @property
    def weight_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.stat().st_size for shard in self.shards)

    @property
    def parameter_count(self) -> int:
        floats = [tensor for tensor in self.tensors.values() if tensor.dtype in DTYPES]
        return sum(tensor.size // DTYPES[tensor.dtype].itemsize for tensor in floats)

    @property
    def has_vision(self) -> bool:
        """Whether config and weights hold a vision tower."""
        names = (hf_name(name).removeprefix("model.") for name in self.tensors)
        return "vision_config" in self.written_config and any(name.startswith(VISION_PARTS) for name in names)

    def content_hash(self, progress: Progress = lambda share, text: None, read: bool = False) -> str:
        """SHA-256 over weights (tensor by tensor, whatever the shards), normalized config and tokenizer.

        File names do not enter. Computed once, and remembered on disk for a large model until a file of it changes.
        read: read every file, whatever is remembered.
        """
        if read or not self._content_hash:
            found = (self.path / name for name in (CONFIG_FILE, *TOKENIZER_FILES))
            before = stamps([*self.shards, *(path for path in found if path.exists())])
            known = None if read else remembered(self.path, before, _HASHING)
            self._content_hash = known or self._hash_contents(progress)
            if not known:
                remember(self.path, before, _HASHING, self._content_hash)
        return self._content_hash

    def _hash_contents(self, progress: Progress) -> str:
        digest = hashlib.sha256()
        for number, (name, tensor) in enumerate(sorted(self.tensors.items())):
            progress(number / len(self.tensors), name)
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for chunk in tensor.chunks():
                digest.update(chunk)
        config = normalize_config(self.written_config)
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        for name in TOKENIZER_FILES:
            if (self.path / name).exists():
                digest.update((self.path / name).read_bytes())
        return digest.hexdigest()

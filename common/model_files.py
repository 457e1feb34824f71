"""The files of a model folder that are read, and a copy of the folder without code for tokenizers and converters.

A model folder may be a stranger's. llama.cpp's converter loads some tokenizer classes with `trust_remote_code=True`,
whatever the user wants. So it must never see a folder that holds code, or that names code elsewhere.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError, first_line
from common.files import atomic_write, scratch_folder


def shard_files(folder: Path) -> list[Path]:
    """The model's safetensors files, in name order."""
    return sorted(folder.glob("model*.safetensors"))


TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_REMEDY = "Fetch the model's files again."
INDEX = "model.safetensors.index.json"
COPIED = (INDEX, *TOKENIZER_FILES, *_PROCESSOR_FILES)  # into a fused folder, unchanged
_CODE = ("auto_map", "model_file")  # keys that name code, for transformers and for mlx-lm
# The files in which they stand.
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", *_PROCESSOR_FILES)

# License and safety files of a model's repository; they go wherever its weights go.
LICENSE_PATTERNS = tuple(f"{word}*" for word in ("LICENSE", "LICENCE", "NOTICE", "Notice", "COPYING", "USE_POLICY"))
LICENSE_PATTERNS += ("SAFETY*", "*ACCEPTABLE_USE*", "*PROHIBITED_USE*", "*RESPONSIBLE_USE*")
_LICENSE_SUFFIX = re.compile(r"|\.(txt|md|rst|pdf|html)|\.\d+", re.IGNORECASE)  # the last: LICENSE-APACHE-2.0

HUB_FILES = ["*.json", "*.jinja", "*.txt", "model*.safetensors", "tokenizer.model", "README.md", *LICENSE_PATTERNS]
HUB_IGNORED = ["*.py*", "*.so"]  # the license patterns would match LICENSE.py


def license_files(folder: Path) -> list[str]:
    """Names of the folder's license and safety files, sorted: texts, web pages and PDFs, never code."""
    found = {path for pattern in LICENSE_PATTERNS for path in folder.glob(pattern)}
    return sorted(path.name for path in found if _LICENSE_SUFFIX.fullmatch(path.suffix) and path.is_file())


def known_files(folder: Path) -> list[Path]:
    """The files, besides the weights, that are read of a model folder, as far as they exist."""
    names = dict.fromkeys((*_CONFIGS, *COPIED, "README.md", *license_files(folder)))
    return [folder / name for name in names if (folder / name).is_file()]


def stray_links(folder: Path) -> list[Path]:
    """The files to be read, weights included, that are links to something outside of the folder.

    Links to the blobs of a hub cache are fine, from within the cache and from elsewhere: the cache consists of them.
    """
    return [path for path in [*known_files(folder), *shard_files(folder)] if _leads_out(path)]


def _leads_out(path: Path) -> bool:
    folder, target = path.parent.resolve(), path.resolve()
    if target.is_relative_to(folder):
        return False
    snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    if snapshot and target.is_relative_to(folder.parents[1] / "blobs"):  # of a hub cache that is not the user's
        return False
    return not _in_hub_cache(target)


def _in_hub_cache(path: Path) -> bool:
    """Whether the path is a blob of the user's hub cache, of one repository or shared by all."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE).resolve()
    return path.is_relative_to(cache) and "blobs" in path.relative_to(cache).parts[:2]


def names_code(folder: Path) -> bool:
    """Whether the folder holds Python, or a config in it names code."""
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    return any(folder.glob("*.py")) or any(_read_json(path) != read_config(path) for path in configs)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder, without the keys that name code. Raises UserError where it is not an object."""
    content: dict[str, Any] = without_code(_read_json(path))
    return content


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, _REMEDY)


def without_code(value: Any) -> Any:
    """`value`, a part of a config, without the keys that name code."""
    if isinstance(value, dict):
        return {key: without_code(part) for key, part in value.items() if key not in _CODE}
    return [without_code(part) for part in value] if isinstance(value, list) else value


def copy_file(source: Path, out: Path) -> None:
    """Copy a file of a model folder, a config without keys that name code. Raises UserError for a stray link."""
    _check_link(source)
    if source.name in _CONFIGS and (content := read_config(source)) != _read_json(source):
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, out)


def copy_template(run: Path, folder: Path) -> None:
    """Copy a run's chat template into one of its folders, where it has one."""
    if (template := run / TEMPLATE_FILE).is_file():
        with atomic_write(folder / TEMPLATE_FILE) as temporary:
            shutil.copyfile(template, temporary)


def _check_link(path: Path) -> None:
    if _leads_out(path):
        raise UserError(f"{path} is a link that leads out of its folder, to {path.resolve()}.", LINK_REMEDY)


LINK_REMEDY = "If you trust it, replace the link by the file itself."


@contextmanager
def scrubbed(folder: Path, weights: bool = False) -> Iterator[Path]:
    """A temporary folder of the same name with the configs and tokenizer files of `folder`, without any code.

    weights: with links to the weights. Raises UserError for a stray link, or a config that is not JSON.
    """
    with scratch_folder() as temporary:
        clean = temporary / (folder.resolve().name or "model")
        clean.mkdir()
        for name in dict.fromkeys((*_CONFIGS, *COPIED)):
            if (folder / name).is_file():
                copy_file(folder / name, clean / name)
        for shard in shard_files(folder) if weights else ():
            _check_link(shard)
            (clean / shard.name).symlink_to(shard.resolve())
        yield clean


def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of the folder; no code of the folder is run. Raises UserError where it cannot be loaded.

    Its `name_or_path` is the folder.
    """
    from transformers import AutoTokenizer

    with scrubbed(folder) as clean:
        try:
            tokenizer = AutoTokenizer.from_pretrained(clean, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # it takes what stands in the files for granted
            raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}", _REMEDY) from None
    tokenizer.name_or_path = str(folder)
    return tokenizer


def encode_texts(tokenizer: Any, texts: Sequence[str], offsets: bool) -> list[Any]:
    """`tokenizers.Encoding` of each text: its ids, and its offsets where asked for. Raises UserError as `tokenize`."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(texts, add_special_tokens=False)
    except Exception as error:  # as above
        raise _unencodable(tokenizer, error) from None


def tokenize(tokenizer: Any, text: str | list[str], add_special_tokens: bool = False, **more: bool) -> Any:
    """The tokenizer's encoding of the text or texts. Raises UserError where its files do not let it encode them."""
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, **more)
    except Exception as error:  # a vocabulary without the piece for unknown letters, and whatever else
        raise _unencodable(tokenizer, error) from None


def _unencodable(tokenizer: Any, error: Exception) -> UserError:
    return UserError(f"{tokenizer.name_or_path}: its tokenizer cannot encode a text: {first_line(error)}", _REMEDY)
